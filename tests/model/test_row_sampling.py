"""Drawing rows: probabilities, exact numbers of rows, weights, and numbers that no rank, order or device changes."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_slm.model.row_sampling import (
    BackwardRows,
    added_variance,
    inclusion,
    nonzero_rows,
    row_count,
    systematic,
    uniform_number,
)


def norms(count: int = 200, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(count).pow(4) * (torch.rand(count) < 0.8)


@pytest.mark.parametrize("count", [1, 2, 30, 70, 150])
def test_probabilities_are_proportional_and_add_up(count: int) -> None:
    norm_N = norms()
    p_N = inclusion(norm_N, count)
    assert float(p_N.sum()) == pytest.approx(count, rel=1e-12)
    assert float(p_N.max()) <= 1.0
    assert not p_N[norm_N == 0].any()
    unsure = (p_N > 0) & (p_N < 1)
    ratio = p_N[unsure] / norm_N[unsure].double()
    assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, rel=1e-12)
    if (p_N == 1).any():
        assert norm_N[p_N == 1].min() >= norm_N[unsure].max()


def test_probabilities_by_bisection() -> None:
    """Another way to the same tau."""
    norm_N = norms().double()
    low, high = 0.0, float(norm_N.sum())
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (norm_N / tau).clamp(max=1).sum() > 60 else (low, tau)
    assert torch.allclose(inclusion(norm_N, 60), (norm_N / high).clamp(max=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [160, 199, 200])
def test_where_all_fit_all_are_taken_once(count: int) -> None:
    norm_N = norms()
    assert (norm_N > 0).sum() <= count
    drawn = systematic(inclusion(norm_N, count), count, 0.7)
    assert len(drawn.row_M.unique()) == count
    assert torch.equal(drawn.weight_M, (norm_N > 0)[drawn.row_M].double())
    assert set(norm_N.nonzero().flatten().tolist()) <= set(drawn.row_M.tolist())


def test_nothing_but_zeros_draws_nothing() -> None:
    drawn = systematic(inclusion(torch.zeros(9), 4), 4, 0.3)
    assert len(drawn.row_M.unique()) == 4
    assert not drawn.weight_M.any()


def test_every_draw_has_exactly_so_many_rows_and_the_right_frequencies() -> None:
    """Over a grid of the uniform number, each row is drawn for the part of it that is its probability."""
    norm_N, count, points = norms(), 40, 2_000
    p_N = inclusion(norm_N, count)
    hits = torch.zeros(len(norm_N), dtype=torch.float64)
    for number in range(points):
        drawn = systematic(p_N, count, (number + 0.5) / points)
        assert drawn.row_M.shape == (count,)
        assert (drawn.weight_M > 0).all()
        assert torch.allclose(drawn.weight_M * p_N[drawn.row_M], torch.ones(count, dtype=torch.float64))
        hits[drawn.row_M] += 1
    assert not hits[norm_N == 0].any(), "a row of zeros was drawn"
    assert float((hits / points - p_N).abs().max()) <= 1.01 / points


@pytest.mark.parametrize("u", [0.0, 1e-16, 0.5, 1 - 2**-53])
def test_rounding_never_changes_the_number_of_rows(u: float) -> None:
    for seed in range(50):
        norm_N = norms(97, seed)
        drawn = systematic(inclusion(norm_N, 31), 31, u)
        assert int((drawn.weight_M > 0).sum()) >= 30
        assert len(drawn.row_M.unique()) == 31


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_always_drawn(bad: float) -> None:
    norm_N = norms()
    norm_N[[3, 150]] = bad
    p_N = inclusion(norm_N, 40)
    assert p_N.isfinite().all()
    assert float(p_N.sum()) == pytest.approx(40)
    for number in range(50):
        drawn = systematic(p_N, 40, uniform_number(number))
        assert {3, 150} <= set(drawn.row_M.tolist())
        assert (drawn.weight_M[(drawn.row_M == 3) | (drawn.row_M == 150)] == 1).all()
    assert added_variance(norm_N, p_N).isfinite()
    every = torch.full((10,), bad)
    assert len(systematic(inclusion(every, 4), 4, 0.9).row_M) == 4


def test_added_variance_is_that_of_the_weighted_sum() -> None:
    """For independent directions the variance of sum(w v) is the sum over rows; measured over draws."""
    norm_N, count = norms(60), 20
    p_N = inclusion(norm_N, count)
    total = 0.0
    for number in range(1500):
        drawn = systematic(p_N, count, uniform_number(1, number))
        weight_N = torch.zeros(60, dtype=torch.float64).index_copy_(0, drawn.row_M, drawn.weight_M)
        total += float(((weight_N - 1) ** 2 * norm_N.double() ** 2).sum())
    assert total / 1500 == pytest.approx(float(added_variance(norm_N, p_N)), rel=0.1)


def test_kept_rows_are_those_with_a_gradient() -> None:
    norm_N = torch.tensor([0.0, 2.0, 0.0, math.nan, 1.0, 0.0])
    drawn = nonzero_rows(norm_N, 4)
    assert drawn.row_M.tolist() == [1, 3, 4, 0]
    assert drawn.weight_M.tolist() == [1, 1, 1, 0]


def test_row_count_is_a_ceiling_without_rounding_noise() -> None:
    assert [row_count(share, 10) for share in (0.7, 0.71, 1.0, 0.01)] == [7, 8, 10, 1]
    assert row_count(0.55, 100) == 55  # 55.00000000000001 in floats


def test_numbers_are_a_hash_of_their_key() -> None:
    assert uniform_number(1234, 0, 0, 0, 0) == uniform_number(1234, 0, 0, 0, 0)
    keys = [
        (1234, step, batch, block, part)
        for step in range(8)
        for batch in range(8)
        for block in (0, 1)
        for part in (0, 1)
    ]
    numbers = [uniform_number(*key) for key in keys]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.06)


def test_two_blocks_and_two_micro_batches_draw_differently() -> None:
    norm_N = norms() + 0.1

    def draw(key: tuple[int, ...], block: int, part: int = 0) -> list[int]:
        rows = BackwardRows(kind="sampled", share=lambda block: 0.3, key=key)
        return rows.draw(norm_N, block=block, part=part).row_M.tolist()

    first = draw((7, 1, 2), 0)
    assert first == draw((7, 1, 2), 0)
    for other in (
        draw((7, 1, 2), 1),
        draw((7, 1, 3), 0),
        draw((7, 2, 2), 0),
        draw((8, 1, 2), 0),
        draw((7, 1, 2), 0, 1),
    ):
        assert other != first
