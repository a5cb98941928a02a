"""Initial weights that do not depend on the layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_seed(seed: int, name: str) -> int:
    """Return the seed of a named tensor: equal for a name and run seed in every process and layout."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes seeds below 2**63


def normal_(name: str, shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """Return the whole (unsharded) tensor `name` with entries from N(0, std), fp32, on the CPU."""
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    return torch.randn(shape, generator=generator) * std
