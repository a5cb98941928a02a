"""Random numbers that belong to a token, not to a process: a hash of (seed, sample, position).

A counter-based generator has no state to save and none to advance, so every rank of every layout, on any
device, draws the same bits for the same token, in whatever order and however often it asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANDOM_SCORE, GUMBEL = 1, 2
"""Streams: numbers of one are independent of those of another."""

_MASK = 0xFFFFFFFF


def uniform_bits(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """32 random bits a token, int64 [N] in [0, 2^32); integer arithmetic only, so alike on every device.

    The finaliser `lowbias32` (C. Wellons, "Prospecting for Hash Functions") over the words of the counter.

    Args:
        sample_N: the sample's number in the order of the run, int64 [N].
        position_N: the token's place in its sample, int64 [N].
    """
    hash_N = torch.full_like(sample_N, stream)
    for word in (seed & _MASK, seed >> 32 & _MASK, sample_N & _MASK, sample_N >> 32 & _MASK, position_N & _MASK):
        hash_N = _mix((hash_N + 0x9E3779B9 & _MASK) ^ word)
    return hash_N


def _mix(x_N: Tensor) -> Tensor:
    """A bijection of 32-bit words; products may wrap in int64, of which the low 32 bits are right all the same."""
    x_N = x_N ^ (x_N >> 16)
    x_N = x_N * 0x7FEB352D & _MASK
    x_N = x_N ^ (x_N >> 15)
    x_N = x_N * 0x846CA68B & _MASK
    return x_N ^ (x_N >> 16)


def uniform(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """fp32 [N], uniform in [0, 1): the upper 24 bits, which fp32 holds exactly."""
    return (uniform_bits(seed, stream, sample_N, position_N) >> 8).float() / 2**24


def gumbel(seed: int, stream: int, sample_N: Tensor, position_N: Tensor) -> Tensor:
    """fp32 [N], standard Gumbel noise `-log(-log u)`, computed in fp64 so that rounding hides the device."""
    u_N = (uniform_bits(seed, stream, sample_N, position_N).double() + 0.5) / 2**32
    return u_N.log().neg().log().neg().float()
