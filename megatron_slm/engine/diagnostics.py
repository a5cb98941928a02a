"""Per-micro-batch diagnostics, kept on the device and read on the host only when a step fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.loss.sums import LossSums, SumLayout


@dataclass(frozen=True, kw_only=True)
class MicroBatchDiagnostics:
    """One micro-batch of a step, as seen by one rank."""

    micro_batch: int
    sums: LossSums | None
    """Sums of its losses; on the last stage's first tensor-parallel rank."""
    gradient_is_finite: bool | None
    """State of the gradient at the bottom of this stage; None where there was no backward pass."""


class StepDiagnostics:
    """Collects the diagnostics of a step. Only `read` waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._finite: dict[int, Tensor] = {}

    def add_sums(self, micro_batch: int, vector: Tensor) -> None:
        """Keep a micro-batch's packed loss sums."""
        self._sums[micro_batch] = vector

    def add_gradient(self, micro_batch: int, gradient: Tensor) -> None:
        """Check the gradient of a micro-batch at the bottom of this stage."""
        # one pass without a table of booleans; a sum that overflows by itself is a gradient gone wrong as well
        self._finite[micro_batch] = gradient.sum(dtype=torch.float32).isfinite()

    def gradient_hook(self, micro_batch: int) -> Callable[[Tensor], None]:
        """Return `add_gradient` of a micro-batch, as a hook for `Tensor.register_hook`."""
        return lambda gradient: self.add_gradient(micro_batch, gradient)

    @property
    def sums_in_order(self) -> list[Tensor]:
        """Packed loss sums by micro-batch, so that their total does not depend on the schedule."""
        return [self._sums[i] for i in sorted(self._sums)]

    def read(self, layout: SumLayout) -> list[MicroBatchDiagnostics]:
        """Read everything on the host.

        Args:
            layout: of the loss sums.
        """
        sums = {i: layout.unpack(vector) for i, vector in self._sums.items()}
        finite = torch.stack(list(self._finite.values())).tolist() if self._finite else []
        gradients = dict(zip(self._finite, finite, strict=True))
        return [
            MicroBatchDiagnostics(micro_batch=i, sums=sums.get(i), gradient_is_finite=gradients.get(i))
            for i in sorted({*sums, *gradients})
        ]
