"""Maps parameters to the slices of logical tensors they hold.

A *logical tensor* is a whole weight as Hugging Face names and shapes it, independent of the layout. A parameter stacks
one or more parts (slices of logical tensors) along dim 0 (`qkv.weight` holds parts of `q_proj`, `k_proj` and `v_proj`),
then zeros for vocabulary padding. Weights are read, written and initialized by logical tensor only, which makes
checkpoints independent of the layout they were saved at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn


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
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.parts = parts  # type: ignore[attr-defined]
    if any(part.dim is not None for part in parts):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


@contextmanager
def parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters in this dtype inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parts_of(parameter: nn.Parameter) -> tuple[Part, ...]:
    """Return the parts of a parameter made by `new_parameter`."""
    return parameter.parts  # type: ignore[attr-defined]


def parts_with_offsets(parameter: nn.Parameter) -> Iterator[tuple[Part, int]]:
    """Yield each part and the offset of its elements in the flattened parameter."""
    offset = 0
    for part in parts_of(parameter):
        yield part, offset
        offset += part.numel
