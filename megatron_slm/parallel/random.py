"""Initial weights that do not depend on the layout: a rank draws the slices it holds, and no others."""

from __future__ import annotations

import hashlib
from math import prod

import numpy as np
import torch
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.parallel.shards import Part, cut_range

WHOLE_ELEMENTS = 2**22
"""Tensors of at most so many elements are drawn whole, by one sequence of numbers."""
TILE_ROWS, TILE_COLUMNS = 64, 256
"""Larger ones are drawn in tiles, each by a counter of its own; a slice takes those that it touches."""


def tensor_seed(seed: int, name: str) -> int:
    """Return the seed of a named tensor: equal for a name and run seed in every process and layout."""
    return int.from_bytes(_digest(seed, name)[:8], "little") >> 1  # torch takes seeds below 2**63


def normal_range(part: Part, begin: int, end: int, *, std: float, seed: int) -> Tensor:
    """Draw elements [begin, end) of a flattened part of a tensor whose entries are N(0, std): 1-D, fp32, on the CPU.

    An element has the same value in whatever part and range it is drawn.
    """
    if prod(part.shape) <= WHOLE_ELEMENTS:
        generator = torch.Generator().manual_seed(tensor_seed(seed, part.name))
        return cut_range(torch.randn(part.shape, generator=generator).mul_(std), part, begin, end)
    width = prod(part.local_shape[1:])
    first, last = begin // width, ceil_div(end, width)  # the rows of the part that hold these elements
    top, left = first + part.start * (part.dim == 0), part.start * (part.dim == 1)
    rows = _rectangle(_digest(seed, part.name)[:16], top, top + last - first, left, left + width)
    return torch.from_numpy(rows).view(-1)[begin - first * width : end - first * width].mul_(std)


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _rectangle(key: bytes, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Draw rows [top, bottom) and columns [left, right) of a matrix of N(0, 1), fp32."""
    out = np.empty((bottom - top, right - left), np.float32)
    number = int.from_bytes(key, "little")
    for i in range(top // TILE_ROWS, ceil_div(bottom, TILE_ROWS)):
        low, high = max(top, i * TILE_ROWS), min(bottom, (i + 1) * TILE_ROWS)
        for j in range(left // TILE_COLUMNS, ceil_div(right, TILE_COLUMNS)):
            start, stop = max(left, j * TILE_COLUMNS), min(right, (j + 1) * TILE_COLUMNS)
            counter = np.random.Philox(key=number, counter=[0, 0, i, j])
            tile = np.random.Generator(counter).standard_normal((TILE_ROWS, TILE_COLUMNS), np.float32)
            out[low - top : high - top, start - left : stop - left] = tile[
                low - i * TILE_ROWS : high - i * TILE_ROWS, start - j * TILE_COLUMNS : stop - j * TILE_COLUMNS
            ]
    return out
