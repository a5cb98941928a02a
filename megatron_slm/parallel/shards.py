"""Which slice of which logical tensor a parameter holds.

A *logical tensor* is a weight as Hugging Face names and shapes it, whole, whatever the layout. A parameter
is one or more of their slices stacked along dim 0 (`qkv.weight` holds slices of `q_proj`, `k_proj` and
`v_proj`), then zeros where a vocabulary was padded. Weights are read, written and initialised by logical
tensor only, which is what makes every checkpoint independent of the layout it was written at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Part:
    """The slice [start, start + length) along `dim` of the logical tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    """None where every tensor-parallel rank holds the whole tensor."""
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
    """A zero parameter that knows its parts, and says to DeepSpeed's norms whether it is a shard.

    DeepSpeed adds up a parameter's norm over the tensor-parallel ranks where it is marked, and counts
    rank 0's alone where it is not; an unmarked shard gives a wrong gradient norm without an error.
    """
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.parts = parts  # type: ignore[attr-defined]
    if any(part.dim is not None for part in parts):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


def parts_of(parameter: nn.Parameter) -> tuple[Part, ...]:
    """The parts a parameter was made with."""
    return parameter.parts  # type: ignore[attr-defined]


def parts_with_offsets(parameter: nn.Parameter) -> Iterator[tuple[Part, int]]:
    """Each part and where its elements begin in the flattened parameter."""
    offset = 0
    for part in parts_of(parameter):
        yield part, offset
        offset += part.numel
