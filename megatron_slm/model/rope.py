"""Rotary position embedding (arXiv 2104.09864) with the scalings of Llama checkpoints."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(width: int, base: float, scaling: dict[str, Any]) -> Tensor:
    """Return the rotation speeds of the width / 2 pairs of a head, in radians per position, fp32 [width / 2].

    Args:
        scaling: empty, or Hugging Face's fields: `linear` divides every speed by `factor`; `llama3` divides the slow
            ones, keeps the fast ones and interpolates between (Llama 3.1, `modeling_rope_utils.py`).
    """
    speeds = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return speeds / scaling["factor"]
    if kind == "llama3":
        return _llama3(speeds, scaling)
    return speeds


def _llama3(speeds: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, old_length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / speeds
    blend = (old_length / wavelengths - low) / (high - low)
    mixed = (1 - blend) * speeds / factor + blend * speeds
    out = torch.where(wavelengths > old_length / low, speeds / factor, speeds)
    between = (wavelengths <= old_length / low) & (wavelengths >= old_length / high)
    return torch.where(between, mixed, out)


def rotation(
    length: int, width: int, base: float, scaling: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of positions 0 to length - 1, fp32 [s, 1, 1, width / 2] each.

    Cached outside the modules, because a buffer would be cast to the run's dtype with the weights. A constant of
    compiled blocks (`compile_blocks`).

    Args:
        scaling: items of the fields of `inverse_frequencies`, as a hashable tuple.
    """
    return _rotation(length, width, base, scaling, device)


@lru_cache(maxsize=8)
def _rotation(
    length: int, width: int, base: float, scaling: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    inverse = inverse_frequencies(width, base, dict(scaling)).to(device)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)[:, None, None]
    return angles.cos(), angles.sin()


def rotate(x_sbhk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + k / 2) of each head by its position's angle, computed in fp32, in the input's dtype.

    [s, b, heads, k] to the same shape.
    """
    first, second = x_sbhk.to(torch.promote_types(x_sbhk.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_sbhk.dtype)
