"""Rotary tables of every scaling against transformers': speeds, the factor of cosines and sines, angles far out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_slm.model.rope import hashable, rotation

WIDTH, MAX_POSITIONS = 16, 4096
PAIRS = WIDTH // 2
OLD = {"original_max_position_embeddings": 1024}
FACTORS = {
    "long_factor": [1.0 + 4 * i for i in range(PAIRS)],
    "short_factor": [1.0 + i / 8 for i in range(PAIRS)],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.2},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OLD},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **OLD},
    "yarn with everything": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 1.3, "mscale_all_dim": 0.7,
        "truncate": False, **OLD,
    },
    "yarn with a factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, **OLD},
    "longrope": {"rope_type": "longrope", **FACTORS, **OLD},
    "longrope with a factor": {"rope_type": "longrope", "factor": 16.0, **FACTORS, **OLD},
    "longrope with a factor of attention": {"rope_type": "longrope", "attention_factor": 1.2, **FACTORS, **OLD},
}  # fmt: skip
LENGTHS = {"one token": 1, "4k": 4097, "128k": 131_073}
"""The last position of each is 0, 4096 and 131072; the second crosses 1024 and MAX_POSITIONS."""


def theirs(scaling: dict[str, Any], length: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(
        hidden_size=4 * WIDTH, num_attention_heads=4, max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0, **scaling},
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0, at, :PAIRS], sin[0, at, :PAIRS]


def ours(scaling: dict[str, Any], length: int, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tables = rotation(length, WIDTH, 500_000.0, hashable(scaling), MAX_POSITIONS, torch.device("cpu"))
    return tuple(table[at, 0, 0] for table in tables)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str, length: int) -> None:
    at = torch.tensor([position for position in (0, 1, 100, 4096, 131_072) if position < length])
    for mine, other in zip(ours(SCALINGS[name], length, at), theirs(SCALINGS[name], length, at), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_long_sequence_turns_by_other_angles(name: str) -> None:
    """Also at its first positions: a rank that has only them must know the whole sequence's length."""
    at = torch.tensor([0, 1, 100])
    short, long = ours(SCALINGS[name], 101, at), ours(SCALINGS[name], 4097, at)
    assert not torch.equal(short[0], long[0])
