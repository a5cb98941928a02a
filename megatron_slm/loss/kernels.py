"""Backends of the two element-wise operations on a block of logits; the products are cuBLAS' or MKL's."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, Protocol

from torch import Tensor

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
            column_N: the label's column, int64; -1 where it is not in this block.
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
    """Choose the kernels of a backend; `auto` is triton on a GPU where it is installed, else torch.

    Raises:
        ConfigError: triton is not installed, or there is no GPU for it.
    """
    installed = importlib.util.find_spec("triton") is not None
    if backend == "torch" or (backend == "auto" and not (on_gpu and installed)):
        from megatron_slm.loss.torch_backend import TorchKernels

        return TorchKernels()
    if not installed:
        raise ConfigError("--loss-head-backend", backend, "be an installed backend", "pip install triton, or use torch")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("--loss-head-backend", backend, "be torch or auto on a CPU", "use torch, or run on a GPU")
    from megatron_slm.loss.triton_backend import TritonKernels

    return TritonKernels()
