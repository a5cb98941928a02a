"""Backends of the two element-wise operations on a block of logits; the products are cuBLAS' or MKL's."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_slm.device import local_device
from megatron_slm.errors import ConfigError
from megatron_slm.loss.row_statistics import RowStatistics

BackendName = Literal["auto", "torch", "triton"]


class Kernels(Protocol):
    """A backend."""

    name: str

    def fold(self, logits_NB: Tensor, rows: RowStatistics, column_N: Tensor, exponentials_NB: Tensor | None) -> None:
        """Fold a block's logits into the rows' statistics, in place; the logits are overwritten.

        Args:
            logits_NB: fp32 (or fp64).
            column_N: the label's column, int64; outside [0, B) where it is not in this block.
            exponentials_NB: receives exp(logit - the new maximum) in its own dtype, unless None.
        """
        ...

    def gradient(
        self,
        x_KB: Tensor,
        factor_K: Tensor,
        column_K: Tensor,
        target_K: Tensor,
        *,
        max_K: Tensor | None,
        out_KB: Tensor,
    ) -> None:
        """Compute the logits' gradients: `exp(x - max) * factor`, and `target` in the label's column.

        Args:
            x_KB: logits, or where `max_K` is None their exponentials from `fold`; overwritten.
            out_KB: receives the result in its own dtype; may be `x_KB` itself.
        """
        ...


def choose_kernels(backend: BackendName, *, on_gpu: bool) -> Kernels:
    """Choose the kernels of a backend; `auto` is triton on a GPU where it works, else torch.

    Raises:
        ConfigError: triton is asked for and does not work, or there is no GPU for it.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "torch" or (backend == "auto" and (not on_gpu or triton_problem() is not None)):
        from megatron_slm.loss.torch_backend import TorchKernels

        return TorchKernels()
    if not on_gpu and not interpreted:
        raise ConfigError("--loss-head-backend", backend, "be torch or auto on a CPU", "use torch, or run on a GPU")
    problem = triton_problem()
    if problem is not None:
        rule = f"be a backend that works here (triton: {problem})"
        raise ConfigError("--loss-head-backend", backend, rule, "pip install triton and a C compiler, or use torch")
    from megatron_slm.loss.triton_backend import TritonKernels

    return TritonKernels()


@cache
def triton_problem() -> str | None:
    """Try Triton's kernels once in this process; the reason they cannot be used, None where they can.

    Triton compiles at the first call, with a C compiler that a container may lack.
    """
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        from megatron_slm.loss.triton_backend import TritonKernels

        if os.environ.get("TRITON_INTERPRET") != "1":
            rows = RowStatistics.of_no_logits(torch.zeros(1, 1, device=local_device()), with_entropy=False)
            TritonKernels().fold(rows.max_N.new_zeros(1, 8), rows, rows.max_N.new_zeros(1, dtype=torch.int64), None)
            if rows.sum_N.item() != 8.0:
                return f"a trial gives {rows.sum_N.item()} instead of 8"
    except Exception as error:  # a compiler fails with whatever its makers raise
        return f"a trial fails: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None
