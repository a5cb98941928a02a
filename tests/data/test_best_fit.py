"""Best-fit packing: every label of an epoch once, documents whole, and as few samples as the plain loop."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.data.best_fit import BestFitSamples, best_fit
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.corpora import make_corpus


def plain_loop(sizes: list[int], capacity: int) -> list[int]:
    """Return the rooms left in the bins, by definition: each size goes into the fullest bin with room for it."""
    rooms: list[int] = []
    for size in sizes:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), max_size=60))
def test_fills_bins_as_the_plain_loop_does(sizes: list[int]) -> None:
    falling = np.array(sorted(sizes, reverse=True), dtype=np.int64)
    bins = best_fit(falling, 20)
    loads = np.bincount(bins, weights=falling) if len(falling) else np.zeros(0)
    assert sorted((20 - loads).astype(int).tolist()) == plain_loop(falling.tolist(), 20)


def samples_of(prefix: Path, lengths: list[int], **changes: int | None) -> BestFitSamples:
    options = {"sequence_length": 8, "num_samples": None, "seed": 1, **changes}
    return BestFitSamples(make_corpus(prefix, lengths, first_id=1), 0, len(lengths), **options)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(lambda x: max(x) > 1))
def test_an_epoch_holds_every_label_once(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    prefix = tmp_path_factory.mktemp("fit") / "c"
    one = samples_of(prefix, lengths)
    samples = samples_of(prefix, lengths, num_samples=2 * len(one))
    expected: Counter[tuple[int, int]] = Counter()
    for i in range(samples.corpus.num_sequences):
        expected.update(pairwise(samples.corpus.get(i).tolist()))
    for epoch in range(2):
        found: Counter[tuple[int, int]] = Counter()
        for place in range(len(one)):
            sample = samples[epoch * len(one) + place]
            begins = np.zeros(10, dtype=bool)
            begins[sample.starts] = True
            labels = sample.valid & ~begins[1:9]
            found.update(zip(sample.tokens[:-1][labels].tolist(), sample.tokens[1:][labels].tolist(), strict=True))
        assert found == expected


def test_documents_that_fit_are_whole_and_padding_is_masked(tmp_path: Path) -> None:
    samples, pieces = samples_of(tmp_path / "c", [9, 5, 4, 3, 2, 2, 20]), []
    tails = {26 + 8, 26 + 16}  # the first tokens of the 20 tokens' later parts: labels of the parts before
    for i in range(len(samples)):
        sample = samples[i]
        filled = int((sample.tokens != 0).sum())  # ids count from 1
        assert (sample.tokens[filled:] == 0).all()
        cut_tails = {start for start in sample.starts.tolist() if 0 < start < filled and sample.tokens[start] in tails}
        assert sample.valid.tolist() == [place + 1 < filled and place + 1 not in cut_tails for place in range(8)]
        assert filled == 9 or sample.starts[-1] == filled
        pieces += np.diff([0, *sample.starts.tolist(), *([9] if filled == 9 else [])]).tolist()
    assert sorted(pieces) == [2, 2, 3, 4, 4, 5, 9, 9, 9], "20 tokens are 9, 9 and 4, which share a token each"
    assert len(samples) == 6


def test_no_token_is_a_label_twice(tmp_path: Path) -> None:
    """Also the first token of a cut document's tail, which the previous piece already has as a label."""
    samples = samples_of(tmp_path / "c", [2, 2, 3, 20, 4, 20, 13])
    labels: Counter[int] = Counter()
    for i in range(len(samples)):
        sample = samples[i]
        labels.update(sample.tokens[1:][sample.valid].tolist())
    assert max(labels.values()) == 1
    assert set(range(1, 65)) - set(labels) <= {1, 3, 5, 8, 28, 32, 52}, "only first tokens of documents are no labels"


def test_the_order_does_not_depend_on_the_number_of_samples(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 20, size=40).tolist()
    short, long = samples_of(tmp_path / "a", lengths), samples_of(tmp_path / "b", lengths, num_samples=100)
    assert len(long) >= 100 > len(short)
    assert [short[i].tokens.tolist() for i in range(len(short))] == [long[i].tokens.tolist() for i in range(len(short))]
    first, second = ([long[e * len(short) + i].tokens.tolist() for i in range(len(short))] for e in range(2))
    assert sorted(first) != sorted(second), "documents meet others in the next epoch"
    assert samples_of(tmp_path / "c", lengths, seed=2).order_fingerprint != short.order_fingerprint
    assert long.order_fingerprint == short.order_fingerprint


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="must be at least 2"):
        samples_of(tmp_path / "c", [1, 1])
    with pytest.raises(ConfigError, match="--seed is -1: must be in"):
        samples_of(tmp_path / "c", [5], seed=-1)
    with pytest.raises(IndexError, match="sample 7"):
        samples_of(tmp_path / "c", [5])[7]
