from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.selection.scope import select_in_scope
from megatron_slm.selection.scores import excess_loss
from megatron_slm.selection.select import kept_counts, num_kept, top_share

scores = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]), st.floats(width=32, allow_nan=False)),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(scores, st.floats(0.01, 1.0), st.randoms())
def test_top_share_is_a_stable_sort(values: list[float], ratio: float, random) -> None:
    valid = [random.random() < 0.8 for _ in values]
    positions = [i for i, ok in enumerate(valid) if ok]
    ranked = sorted(positions, key=lambda i: (-values[i] + 0.0, i))
    expected = sorted(ranked[: num_kept(len(positions), ratio)])
    assert top_share(torch.tensor(values), torch.tensor(valid), ratio).tolist() == expected


@pytest.mark.parametrize(
    ("valid", "ratio", "kept"),
    [(0, 0.6, 0), (1, 0.01, 1), (5, 0.6, 3), (10, 0.6, 6), (11, 0.6, 7), (7, 1.0, 7), (15, 0.2, 3), (3000, 0.1, 300)],
)
def test_num_kept_is_the_ceiling(valid: int, ratio: float, kept: int) -> None:
    assert num_kept(valid, ratio) == kept


def test_nan_is_never_kept_and_counts_as_not_valid() -> None:
    score = torch.tensor([1.0, math.nan, 5.0, -math.nan])
    assert top_share(score, torch.ones(4, dtype=torch.bool), 0.5).tolist() == [2]
    assert top_share(score[1:2], torch.ones(1, dtype=torch.bool), 0.5).tolist() == []


def test_scopes_differ_and_each_is_exact() -> None:
    score_bs = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    valid_bs = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert select_in_scope(score_bs, valid_bs, 0.5, "micro-batch").nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert select_in_scope(score_bs, valid_bs, 0.5, "sequence").nonzero().flatten().tolist() == [0, 1, 5, 7]


@given(st.integers(0, 4000), st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7, 1 / 3])))
@settings(max_examples=40, deadline=None)
def test_counts_on_the_device_are_the_ceilings(most: int, ratio: float) -> None:
    table = kept_counts(most, ratio, torch.device("cpu")).tolist()
    assert table == [num_kept(valid, ratio) for valid in range(most + 1)]


def test_excess_loss_is_signed() -> None:
    assert excess_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])).tolist() == [-1.0, 2.0]
