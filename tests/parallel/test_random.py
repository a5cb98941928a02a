"""Random starts: the numbers of one whole tensor at every layout, of which a rank draws its slice."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slm.checkpoint.weights import RandomWeights, read_range
from megatron_slm.config.architecture import Architecture
from megatron_slm.parallel import random
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.random import TILE_COLUMNS, TILE_ROWS, WHOLE_ELEMENTS, normal_range, tensor_seed
from megatron_slm.parallel.shards import Part, cut_range

SHAPE = (300, 900)
"""Of several tiles, and no multiple of one."""


def whole(name: str, shape: tuple[int, ...], *, std: float = 1.0, seed: int = 1) -> Tensor:
    return normal_range(Part(name=name, shape=shape), 0, prod(shape), std=std, seed=seed).view(shape)


def test_small_tensors_are_one_sequence_of_torchs() -> None:
    """The numbers of earlier versions."""
    generator = torch.Generator().manual_seed(tensor_seed(3, "a"))
    assert torch.equal(whole("a", (12, 40), std=0.1, seed=3), torch.randn(12, 40, generator=generator) * 0.1)
    assert tensor_seed(1, "a") != tensor_seed(2, "a") != tensor_seed(2, "b")


@pytest.mark.parametrize("drawn_whole", [WHOLE_ELEMENTS, 0])
@pytest.mark.parametrize(
    ("dim", "start", "length"), [(None, 0, 0), (0, 7, 120), (1, 250, 525), (0, 64, 64), (1, 256, 8)]
)
def test_a_slice_has_the_numbers_of_the_whole_tensor(
    monkeypatch: pytest.MonkeyPatch, drawn_whole: int, dim: int | None, start: int, length: int
) -> None:
    monkeypatch.setattr(random, "WHOLE_ELEMENTS", drawn_whole)
    part = Part(name="w", shape=SHAPE, dim=dim, start=start, length=length)
    of_whole = whole("w", SHAPE, std=0.5)
    for begin, end in ((0, part.numel), (5, 6), (part.numel // 3, 2 * part.numel // 3 + 1)):
        drawn = normal_range(part, begin, end, std=0.5, seed=1)
        assert torch.equal(drawn, cut_range(of_whole, part, begin, end))


def test_a_rank_draws_the_tiles_that_its_slice_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of 64 GiB: columns that two tiles hold, rows that three do."""
    drawn: list[tuple[int, ...]] = []
    real = np.random.Philox

    def counted(*, key: int, counter: list[int]) -> np.random.Philox:
        drawn.append(tuple(counter))
        return real(key=key, counter=counter)

    monkeypatch.setattr(np.random, "Philox", counted)
    part = Part(name="w", shape=(2**20, 2**14), dim=1, start=3 * TILE_COLUMNS - 10, length=20)
    begin = (100 * TILE_ROWS - 1) * part.length + 5
    values = normal_range(part, begin, begin + (TILE_ROWS + 2) * part.length - 5, std=1.0, seed=0)
    assert len(values) == (TILE_ROWS + 2) * part.length - 5
    assert drawn == [(0, 0, i, j) for i in (99, 100, 101) for j in (2, 3)]


def test_tiles_are_independent_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "WHOLE_ELEMENTS", 0)
    values = whole("w", SHAPE, std=2.0).double() / 2.0
    deviation = values.numel() ** -0.5
    assert abs(values.mean()) < 5 * deviation
    assert abs(values.square().mean() - 1) < 5 * 2**0.5 * deviation
    assert abs(values.pow(4).mean() - 3) < 5 * 96**0.5 * deviation
    tiles = [
        tile[:, :TILE_COLUMNS].flatten()
        for row in values.split(TILE_ROWS)[:4]
        for tile in row.split(TILE_COLUMNS, dim=1)[:3]
    ]
    for one, other in pairwise(tiles):
        assert abs((one * other).mean()) < 5 * len(one) ** -0.5
    other_name, other_seed = whole("v", SHAPE), whole("w", SHAPE, seed=2)
    for other in (other_name, other_seed):
        assert abs((values * other).mean()) < 5 * deviation


ARCH = Architecture(
    num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=4, kv_channels=4,
    vocab_size=48,
)  # fmt: skip


@pytest.mark.parametrize("drawn_whole", [WHOLE_ELEMENTS, 0])
def test_tensor_parallel_ranks_start_with_the_numbers_of_one(monkeypatch: pytest.MonkeyPatch, drawn_whole: int) -> None:
    monkeypatch.setattr(random, "WHOLE_ELEMENTS", drawn_whole)
    monkeypatch.setattr(random, "TILE_ROWS", 5)
    monkeypatch.setattr(random, "TILE_COLUMNS", 7)
    source = RandomWeights(ARCH, seed=4)

    def parameters(size: int, rank: int) -> list[Tensor]:
        layers = ParallelLayers(TensorParallel(size=size, rank=rank))
        made = [
            layers.linear_in("m.", 16, {"a": 24, "b": 8}),
            layers.linear_out("m.down_proj", 24, 16),
            layers.embedding("model.embed_tokens", 48, 16),
        ]
        held = [next(module.parameters()) for module in made]
        return [read_range(p, source, "weight", 0, p.numel()).view(p.shape) for p in held]

    both, down, embedding = parameters(1, 0)
    a, b = both.split([24, 8])
    for rank in range(4):
        held = parameters(4, rank)
        assert torch.equal(held[0], torch.cat([a.chunk(4)[rank], b.chunk(4)[rank]]))
        assert torch.equal(held[1], down.chunk(4, dim=1)[rank])
        assert torch.equal(held[2], embedding.chunk(4)[rank])
    assert abs(down.std() - 0.02 / 2**0.5) < 0.002
