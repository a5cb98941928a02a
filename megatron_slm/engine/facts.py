"""What a step saw of each micro-batch, kept on the device and brought over only where a step went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.loss.sums import LossSums, SumLayout


@dataclass(frozen=True, kw_only=True)
class MicroBatchFacts:
    """One micro-batch of a step, as one rank saw it."""

    micro_batch: int
    sums: LossSums | None
    """Of its losses; on the last stage's first tensor-parallel rank."""
    gradient_is_finite: bool | None
    """Of the gradient that left this stage downwards; None where there was no backward pass."""


class StepFacts:
    """Collects them. Nothing here waits for the device before `read`."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        """Packed, by micro-batch."""
        self._finite: dict[int, Tensor] = {}

    def add_sums(self, micro_batch: int, vector: Tensor) -> None:
        """Keep a micro-batch's packed loss sums."""
        self._sums[micro_batch] = vector

    def see_gradient(self, micro_batch: int, gradient: Tensor) -> None:
        """The gradient of a micro-batch at the bottom of this stage."""
        # one pass without a table of booleans; a sum that overflows by itself is a gradient gone wrong as well
        self._finite[micro_batch] = gradient.sum(dtype=torch.float32).isfinite()

    def watch(self, micro_batch: int) -> Callable[[Tensor], None]:
        """`see_gradient` of a micro-batch, as a hook."""
        return lambda gradient: self.see_gradient(micro_batch, gradient)

    @property
    def in_order(self) -> list[Tensor]:
        """The vectors by micro-batch, so that their sum does not depend on the order of the schedule."""
        return [self._sums[i] for i in sorted(self._sums)]

    def read(self, layout: SumLayout) -> list[MicroBatchFacts]:
        """Everything, on the host."""
        numbers = sorted({*self._sums, *self._finite})
        sums = {i: layout.unpack(vector) for i, vector in self._sums.items()}
        finite = torch.stack(list(self._finite.values())).tolist() if self._finite else []
        gradients = dict(zip(self._finite, finite, strict=True))
        return [MicroBatchFacts(micro_batch=i, sums=sums.get(i), gradient_is_finite=gradients.get(i)) for i in numbers]
