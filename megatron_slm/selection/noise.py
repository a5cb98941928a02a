"""Random numbers per token, independent of the process: a hash of (seed, sample, position).

A counter-based generator has no state to save or advance, so every rank of every layout, on any device, draws the
same bits for the same token, in any order and any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANDOM_SCORE, GUMBEL, STORED_SAMPLE = 1, 2, 3
"""Streams of mutually independent numbers."""

_MASK = 0xFFFFFFFF


def uniform_bits(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """Return 32 random bits per token, int64 [N] in [0, 2^32); integer arithmetic only, so equal on every device.

    The finalizer `lowbias32` (C. Wellons, "Prospecting for Hash Functions") over the words of the counter.

    Args:
        sample_N: index of the sample in the order of the run, int64 [N].
        position_N: position of the token in its sample, int64 [N].
    """
    hash_N = torch.full_like(sample_N, stream)
    for word in (seed & _MASK, seed >> 32 & _MASK, sample_N & _MASK, sample_N >> 32 & _MASK, position_N & _MASK):
        hash_N = _mix((hash_N + 0x9E3779B9 & _MASK) ^ word)
    return hash_N


def _mix(x_N: Tensor) -> Tensor:
    """Apply a bijection of 32-bit words; products may wrap in int64, which leaves the low 32 bits correct."""
    x_N = x_N ^ (x_N >> 16)
    x_N = x_N * 0x7FEB352D & _MASK
    x_N = x_N ^ (x_N >> 15)
    x_N = x_N * 0x846CA68B & _MASK
    return x_N ^ (x_N >> 16)


def uniform(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), fp32 [N], from the upper 24 bits, which fp32 represents exactly."""
    return (uniform_bits(seed, stream, sample_N, position_N) >> 8).float() / 2**24


def gumbel(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """Return standard Gumbel noise `-log(-log u)`, fp32 [N], computed in fp64 so that it is equal on every device."""
    u_N = (uniform_bits(seed, stream, sample_N, position_N).double() + 0.5) / 2**32
    return u_N.log().neg().log().neg().float()
