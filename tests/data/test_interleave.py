"""Blends draw in megatron-core's order, to the last tie."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.data import interleave as interleave_module
from megatron_slm.data.greedy_order import GreedyOrder, compiled_order
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.interleave import COUNTED_EVERY, MOST_CORPORA, Interleave, normalized
from megatron_slm.errors import ConfigError
from tests.data import megatron_oracle  # noqa: F401  (silences its imports)


def megatron(weights: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    from megatron.core.datasets import helpers

    source, number = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(source, number, np.array(weights), len(weights), size, False)
    return source, number


def greedy_choices(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    built = IndexCache(None).arrays("blend", "", None, lambda: interleave_module.greedy_choices(weights, size))
    return built["choice"], built["counts"]


CASES = {
    "the paper's 6:3:1": ([6, 3, 1], 50_000),
    "equal": ([1, 1], 5000),
    "seven equal": ([1] * 7, 9000),
    "one rare": ([1e-5, 1.0], 250_000),
    "one": ([3.0], 3000),
    "a hundred, most of them rare": ([1.0, *[1e-4] * 99], 120_000),
    "below one block": ([0.3, 0.7], 100),
    "exactly two blocks": ([0.3, 0.7], 2048),
    "exactly the samples between two counts": ([0.3, 0.5, 0.2], COUNTED_EVERY),
    "beyond them": ([0.3, 0.5, 0.2], 2 * COUNTED_EVERY + 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "side by side"])
def test_equals_megatrons_helper(case: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleave_module, "_COMPILED_FROM", 0 if compiled else 10**18)
    raw, size = CASES[case]
    weights = normalized(raw)
    source, number = megatron(list(weights), size)
    choice, counts = greedy_choices(np.array(weights), size)
    np.testing.assert_array_equal(choice, source)
    interleave = Interleave(weights, size)
    for index in [0, 1, size // 3, size // 2, min(size - 1, 1024), size - 1]:
        assert interleave[index] == (source[index], number[index])
        assert interleave.drawn(index) == np.bincount(source[:index], minlength=len(weights)).tolist()
    assert interleave.drawn(size) == np.bincount(source, minlength=len(weights)).tolist()
    assert counts[0].tolist() == [0] * len(weights)


def test_a_thousand_corpora_of_very_different_weights_equal_megatrons_helper() -> None:
    raw = np.random.default_rng(0).pareto(1.1, 1000) + 1e-3
    raw[100:200] = raw[100]
    weights, size = normalized(raw.tolist()), 200_000
    source, _ = megatron(list(weights), size)
    order = compiled_order(np.array(weights))
    assert order is not None
    np.testing.assert_array_equal(order.draw(150_000), source[:150_000])
    np.testing.assert_array_equal(order.drawn(), np.bincount(source[:150_000], minlength=1000))
    np.testing.assert_array_equal(order.draw(50_000), source[150_000:])


@pytest.mark.parametrize("kind", ["uniform", "nearly equal", "few sizes", "a dominant one", "rare ones and a tie"])
def test_hundreds_of_corpora_equal_megatrons_helper(kind: str) -> None:
    generator = np.random.default_rng(1)
    raw = {
        "uniform": generator.random(300) + 0.01,
        "nearly equal": 1 + 1e-7 * generator.random(300),
        "few sizes": generator.integers(1, 4, 300) * 0.1,
        "a dominant one": np.array([1e4, *generator.random(299)]),
        "rare ones and a tie": np.array([*(1 + generator.random(20)), 4, 2, *(1e-4 * (1 + generator.random(278)))]),
    }[kind]
    weights, size = normalized(raw.tolist()), 150_000
    order = compiled_order(np.array(weights))
    assert order is not None
    np.testing.assert_array_equal(order.draw(size), megatron(list(weights), size)[0])


def test_a_few_more_corpora_than_are_always_compared_equal_megatrons_helper() -> None:
    order = compiled_order(np.ones(1))
    assert order is not None
    for seed in range(300):
        weights = normalized((np.random.default_rng(seed).random(17 + seed % 9) + 0.01).tolist())
        found = GreedyOrder(np.array(weights), order.library).draw(4000)
        np.testing.assert_array_equal(found, megatron(list(weights), 4000)[0], err_msg=str(seed))


def test_the_work_a_sample_hardly_grows_with_the_corpora_and_not_with_the_samples() -> None:
    """A plain loop compares all of them at each sample: 10^11 values for 10^8 samples of 1,000 corpora."""

    def work(raw: np.ndarray, num_samples: int) -> float:
        order = compiled_order(np.array(normalized(raw.tolist())))
        assert order is not None
        order.draw(num_samples)
        before = order.comparisons
        order.draw(num_samples)
        return (order.comparisons - before) / num_samples

    random = np.random.default_rng(0).random(4000)
    thousand = work(random[:1000] + 0.01, 100_000)
    assert thousand < 50
    assert work(random[:1000] + 0.01, 400_000) < 1.1 * thousand
    assert work(random + 0.01, 100_000) < 2.5 * thousand
    assert work(1 + 1e-7 * random, 100_000) < 5 * thousand, "shards of nearly one size are drawn round after round"
    assert work(np.where(random < 0.01, 1.0, 1e-4 * (1 + random)), 100_000) < 5 * thousand


def test_more_corpora_than_an_order_can_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="65,537 corpora"):
        Interleave([1.0] * (MOST_CORPORA + 1), 10)


@pytest.mark.slow
def test_a_hundred_million_samples_of_a_thousand_corpora_take_little_memory(tmp_path: Path) -> None:
    weights = normalized((np.random.default_rng(0).random(1000) + 0.01).tolist())
    tracemalloc.start()
    Interleave(weights, 10**8, IndexCache(tmp_path)).drawn(10**8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6, "counts of 1,526 blocks are 12 MB"


def test_without_a_compiler_the_order_is_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = np.array(normalized([6, 3, 1]))
    monkeypatch.setattr(interleave_module, "_COMPILED_FROM", 0)
    with_one = greedy_choices(weights, 70_000)
    monkeypatch.setenv("CC", "/no/such/compiler")
    without = greedy_choices(weights, 70_000)
    assert "no C compiler" in caplog.text
    for one, other in zip(with_one, without, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 10), min_size=1, max_size=9), size=st.integers(1, 5000))
def test_equals_megatrons_helper_for_any_weights(weights: list[float], size: int) -> None:
    shares = normalized(weights)
    np.testing.assert_array_equal(greedy_choices(np.array(shares), size)[0], megatron(list(shares), size)[0])


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 10), min_size=2, max_size=9), size=st.integers(1, 3000))
def test_no_corpus_is_more_than_one_sample_ahead_of_its_weight(weights: list[float], size: int) -> None:
    """`needed_samples` relies on this bound."""
    shares = np.array(normalized(weights))
    choice, _ = greedy_choices(shares, size)
    drawn = np.cumsum(choice[:, None] == np.arange(len(shares)), axis=0)
    assert (drawn <= shares * np.arange(size)[:, None] + 1 + 1e-9).all()
