"""Maps parameters to the slices of logical tensors they hold.

A *logical tensor* is a whole weight as Hugging Face names and shapes it, independent of the layout. A parameter stacks
one or more parts (slices of logical tensors) along dim 0 (`qkv.weight` holds parts of `q_proj`, `k_proj` and `v_proj`),
then zeros for vocabulary padding. Weights are read, written and initialized by logical tensor only, which makes
checkpoints independent of the layout they were saved at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Part:
    """Slice [start, start + length) along `dim` of the logical tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    """None where the tensor is replicated on the tensor-parallel ranks."""
    start: int = 0
    length: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.dim is None:
            return self.shape
        return tuple(self.length if i == self.dim else n for i, n in enumerate(self.shape))

    @property
    def numel(self) -> int:
        """Number of elements of the slice."""
        return prod(self.local_shape)


def new_parameter(shape: tuple[int, ...], parts: tuple[Part, ...]) -> nn.Parameter:
    """Make a zero parameter that knows its parts, marked for DeepSpeed's norms if it is partitioned.

    DeepSpeed sums the norms of marked parameters over the tensor-parallel ranks and takes rank 0's for others; an
    unmarked partitioned parameter gives a wrong gradient norm without an error.
    """
    parameter = nn.Parameter(no_values(shape) if _WITHOUT_VALUES.get() else torch.zeros(shape))
    parameter.parts = parts  # type: ignore[attr-defined]
    if any(part.dim is not None for part in parts):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


_WITHOUT_VALUES = ContextVar("without values", default=False)


def no_values(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor with the memory of one element, NaN: what is computed with it shows."""
    return torch.full((), torch.nan).expand(shape)


@contextmanager
def parameters_in(dtype: torch.dtype, *, without_values: bool = False) -> Iterator[None]:
    """Make parameters in this dtype inside the context.

    Args:
        without_values: they take no memory, for those who give the ranks their shares of them.
    """
    before, token = torch.get_default_dtype(), _WITHOUT_VALUES.set(without_values)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        _WITHOUT_VALUES.reset(token)


def parts_of(parameter: nn.Parameter) -> tuple[Part, ...]:
    """Return the parts of a parameter made by `new_parameter`."""
    return parameter.parts  # type: ignore[attr-defined]


def parts_with_offsets(parameter: nn.Parameter) -> Iterator[tuple[Part, int]]:
    """Yield each part and the offset of its elements in the flattened parameter."""
    offset = 0
    for part in parts_of(parameter):
        yield part, offset
        offset += part.numel


def cut_range(whole: Tensor, part: Part, begin: int, end: int) -> Tensor:
    """Cut elements [begin, end) of the flattened `part` from a whole logical tensor."""
    held = whole if part.dim is None else whole.narrow(part.dim, part.start, part.length)
    return held.reshape(-1)[begin:end]
