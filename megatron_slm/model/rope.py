"""Rotary position embedding (arXiv 2104.09864) with the scalings of Hugging Face's `modeling_rope_utils.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

HashableScaling = tuple[tuple[str, Any], ...]
"""Items of a scaling's fields, lists as tuples."""


def inverse_frequencies(
    width: int, base: float, scaling: dict[str, Any], *, length: int = 1, max_positions: int = 1
) -> Tensor:
    """Return the rotation speeds of the width / 2 pairs of a head, in radians per position, fp32 [width / 2].

    Args:
        scaling: empty, or Hugging Face's fields, whose `rope_type` names a function of this module.
        length: positions of the whole sequence, which `dynamic` and `longrope` depend on.
        max_positions: the model's `max_position_embeddings`.
    """
    kind = scaling.get("rope_type", "default")
    if kind == "dynamic" and length > max_positions:
        return _speeds(width, _dynamic_base(width, base, scaling["factor"], length, max_positions))
    speeds = _speeds(width, base)
    if kind == "linear":
        return speeds / scaling["factor"]
    if kind == "llama3":
        return _llama3(speeds, scaling)
    if kind == "yarn":
        return _yarn(width, base, scaling)
    if kind == "longrope":
        is_long = length > scaling["original_max_position_embeddings"]
        factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"], dtype=torch.float32)
        return 1.0 / (factors * base ** _exponents(width))
    return speeds


def attention_factor(scaling: dict[str, Any], max_positions: int) -> float:
    """Return the factor of all cosines and sines, by which `yarn` and `longrope` sharpen attention."""
    kind = scaling.get("rope_type", "default")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if kind == "yarn":
        factor, scale, other_scale = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
        if scale and other_scale:
            return _magnitude(factor, scale) / _magnitude(factor, other_scale)
        return _magnitude(factor, 1.0)
    old_length = scaling["original_max_position_embeddings"]
    growth = scaling.get("factor") or max_positions / old_length
    return 1.0 if growth <= 1.0 else math.sqrt(1 + math.log(growth) / math.log(old_length))


def _exponents(width: int) -> Tensor:
    return torch.arange(0, width, 2, dtype=torch.int64).float() / width


def _speeds(width: int, base: float | Tensor) -> Tensor:
    return 1.0 / base ** _exponents(width)


def _dynamic_base(width: int, base: float, factor: float, length: int, max_positions: int) -> Tensor:
    """Raise the base for sequences longer than the model's (NTK-aware scaling), in fp32 as Hugging Face does."""
    growth = factor * torch.tensor(length) / max_positions - (factor - 1)
    return base * growth ** (width / (width - 2))


def _llama3(speeds: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Divide slow speeds by `factor`, keep fast ones, and interpolate between (Llama 3.1)."""
    factor, old_length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / speeds
    blend = (old_length / wavelengths - low) / (high - low)
    mixed = (1 - blend) * speeds / factor + blend * speeds
    out = torch.where(wavelengths > old_length / low, speeds / factor, speeds)
    between = (wavelengths <= old_length / low) & (wavelengths >= old_length / high)
    return torch.where(between, mixed, out)


def _yarn(width: int, base: float, scaling: dict[str, Any]) -> Tensor:
    """Divide the speeds of slow pairs by `factor`, keep those of fast ones, with a ramp between (arXiv 2309.00071)."""
    old_length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_with(rotations: float, rounded: Callable[[float], float]) -> float:
        pair = width * math.log(old_length / (rotations * 2 * math.pi)) / (2 * math.log(base))
        return rounded(pair) if scaling.get("truncate", True) else pair

    low = max(pair_with(scaling.get("beta_fast") or 32, math.floor), 0)
    high = min(pair_with(scaling.get("beta_slow") or 1, math.ceil), width - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = base ** _exponents(width)
    kept = 1 - slow
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def hashable(scaling: dict[str, Any]) -> HashableScaling:
    """Return a scaling's fields as `rotation` takes them."""
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(scaling.items()))


def rotation(
    length: int, width: int, base: float, scaling: HashableScaling, max_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of positions 0 to length - 1, fp32 [s, 1, 1, width / 2] each.

    Cached outside the modules, because a buffer would be cast to the run's dtype with the weights. A constant of
    compiled blocks (`compile_blocks`).

    Args:
        length: positions of the whole sequence.
        scaling: `hashable` fields of `inverse_frequencies`.
        max_positions: the model's `max_position_embeddings`.
    """
    return _rotation(length, width, base, scaling, max_positions, device)


@lru_cache(maxsize=8)
def _rotation(
    length: int, width: int, base: float, scaling: HashableScaling, max_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    fields = dict(scaling)
    inverse = inverse_frequencies(width, base, fields, length=length, max_positions=max_positions).to(device)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)[:, None, None]
    factor = attention_factor(fields, max_positions)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_sbhk: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the pairs (i, i + r / 2) of each head by its position's angle, computed in fp32, in the input's dtype.

    [s, b, heads, k] to the same shape. The tables have r / 2 angles, r <= k; channels from r on stay as they are.

    Args:
        interleaved: rotate the pairs (2i, 2i + 1).
    """
    width = 2 * cos.shape[-1]
    if width < x_sbhk.shape[-1]:
        rotated = rotate(x_sbhk[..., :width], cos, sin, interleaved=interleaved)
        return torch.cat([rotated, x_sbhk[..., width:]], dim=-1)
    x_fp32 = x_sbhk.to(torch.promote_types(x_sbhk.dtype, torch.float32))
    if interleaved:
        first, second = x_fp32[..., 0::2], x_fp32[..., 1::2]
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return pairs.flatten(-2).to(x_sbhk.dtype)
    first, second = x_fp32.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_sbhk.dtype)
