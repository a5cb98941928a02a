"""Sample order: Megatron's, token by token, for training; every label exactly once for held-out sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.data.packing import PackedSamples, SequentialSamples, split_bounds
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.corpora import make_corpus
from tests.data.megatron_oracle import gpt_dataset, megatron_bounds

RANDOM = np.random.default_rng(7)
MANY = RANDOM.integers(1, 40, size=100).tolist()
WITH_EMPTY = [0, 0, 5, 0, 1, 1, 30, 0, 0, 12, 2, 0]
# (document lengths, sequence length, samples): epochs and a separate last epoch in the test's name
CASES = {
    "one epoch": (MANY, 16, 50),
    "one epoch, all samples": (MANY, 16, None),
    "two epochs, last one little used": (MANY, 16, int(sum(MANY) / 16 * 1.3)),
    "two epochs, last one much used": (MANY, 16, int(sum(MANY) / 16 * 1.95)),
    "five epochs, last one little used": (MANY, 16, int(sum(MANY) / 16 * 4.5)),
    "five epochs, last one much used": (MANY, 16, int(sum(MANY) / 16 * 4.9)),
    "79 of 100 samples of the last epoch": ([7] * 228 + [5], 16, 179),
    "80 of 100 samples of the last epoch": ([7] * 228 + [5], 16, 180),
    "samples longer than documents": (MANY, 301, 40),
    "documents without a token": (WITH_EMPTY, 4, 40),
    "first document without a token, one epoch": (WITH_EMPTY, 3, 10),
    "sample longer than an epoch": ([3, 2, 4], 20, 7),
    "one document": ([17], 4, 30),
    "one long document": ([1000], 10, 99),
    "tokens a multiple of the length": ([8] * 8, 8, 7),
    "one token more": ([8] * 8 + [1], 8, 8),
}


@pytest.mark.parametrize("seed", [0, 1234])
@pytest.mark.parametrize("case", CASES)
def test_equals_megatrons_gpt_dataset(tmp_path: Path, case: str, seed: int) -> None:
    lengths, sequence_length, num_samples = CASES[case]
    corpus = make_corpus(tmp_path / "corpus", lengths)
    start, stop = (0, len(lengths)) if lengths is not MANY else (3, len(lengths) - 5)
    ours = PackedSamples(corpus, start, stop, sequence_length=sequence_length, num_samples=num_samples, seed=seed)
    theirs = gpt_dataset(
        tmp_path / "corpus",
        range(start, stop),
        sequence_length=sequence_length,
        num_samples=num_samples,
        seed=seed,
    )
    np.testing.assert_array_equal(ours.document_index, theirs.document_index)
    np.testing.assert_array_equal(ours.shuffle_index, theirs.shuffle_index)
    assert ours.shuffle_index.dtype == theirs.shuffle_index.dtype
    assert len(ours) == len(theirs) >= (num_samples or 0)
    for index in range(len(ours)):
        expected, _ = theirs._query_document_sample_shuffle_indices(index)
        tokens, valid, *_ = ours[index]
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, expected)
        assert valid.shape == (sequence_length,)
        assert valid.all()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    sequence_length=st.integers(2, 9),
    num_samples=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_megatrons_gpt_dataset_on_any_corpus(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    sequence_length: int,
    num_samples: int,
    seed: int,
) -> None:
    prefix = tmp_path_factory.mktemp("any") / "corpus"
    order = {"sequence_length": sequence_length, "num_samples": num_samples, "seed": seed}
    ours = PackedSamples(make_corpus(prefix, lengths), 0, len(lengths), **order)
    theirs = gpt_dataset(prefix, range(len(lengths)), **order)
    assert len(ours) == len(theirs)
    for index in range(len(ours)):
        np.testing.assert_array_equal(ours[index].tokens, theirs._query_document_sample_shuffle_indices(index)[0])


def test_cases_match_their_names(tmp_path: Path) -> None:
    separate = {}
    for case, (lengths, sequence_length, num_samples) in CASES.items():
        samples = PackedSamples(
            make_corpus(tmp_path / "c", lengths),
            0,
            len(lengths),
            sequence_length=sequence_length,
            num_samples=num_samples,
            seed=1,
        )
        separate[case] = (samples.num_epochs, samples._num_shuffled_first < len(samples))
    assert separate["one epoch"] == (1, False)
    assert separate["two epochs, last one little used"] == (2, True)
    assert separate["two epochs, last one much used"] == (2, False)
    assert separate["79 of 100 samples of the last epoch"] == (2, True)
    assert separate["80 of 100 samples of the last epoch"] == (2, False)
    assert separate["five epochs, last one little used"] == (5, True)
    assert separate["five epochs, last one much used"] == (5, False)


@pytest.mark.parametrize(
    "split", ["969,30,1", "99,1,0", "1,0,0", "0.7, .2 ,0.1", "100", "1,1", "0,0,1", "949,50,1", "1,1,1"]
)
@pytest.mark.parametrize("num_sequences", [1, 10, 1000, 7473, 123_457])
def test_split_bounds_are_megatrons(split: str, num_sequences: int) -> None:
    ours = split_bounds(split, num_sequences)
    for (start, stop), theirs in zip(ours, megatron_bounds(split, num_sequences), strict=True):
        assert (start == stop) if theirs is None else ((start, stop) == theirs)
    assert ours[0][0] == 0
    assert ours[-1][1] == num_sequences


@pytest.mark.parametrize("split", ["", "1,2,3,4", "a,b", "-1,2", "0,0,0", "1;2", "1e3,1", "1,,2"])
def test_split_that_is_not_numbers(split: str) -> None:
    with pytest.raises(ConfigError, match=r"--split is .*must be one to three numbers"):
        split_bounds(split, 10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 0}, "number of samples is 0: must be at least 1"),
        ({"seed": -1}, "--seed is -1: must be in"),
        ({"seed": 2**32}, "--seed is 4294967296: must be in"),
        ({"sequence_length": 0}, "--seq-length is 0: must be at least 1"),
    ],
)
def test_packed_samples_reject_bad_numbers(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    corpus = make_corpus(tmp_path / "c", [5, 5])
    with pytest.raises(ConfigError, match=message):
        PackedSamples(corpus, 0, 2, **{"sequence_length": 4, "num_samples": 2, "seed": 1, **changed})


@pytest.mark.parametrize("bounds", [(-1, 1), (0, 3), (2, 1)])
def test_sequences_outside_the_corpus(tmp_path: Path, bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"range of sequences is .*must lie within the 2 sequences of"):
        SequentialSamples(make_corpus(tmp_path / "c", [5, 5]), *bounds, sequence_length=4)


def test_an_index_beyond_memory_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """2 * 10**12 documents in all epochs, more than any machine's memory: the numbers of epochs and samples are right."""
    corpus = make_corpus(tmp_path / "corpus", [8] * 1000)
    samples = PackedSamples(corpus, 0, 1000, sequence_length=16, num_samples=10**12, seed=1)
    assert (samples.num_epochs, len(samples)) == (2 * 10**9 + 1, 10**12 + 499)
    with pytest.raises(
        ConfigError, match=r"is '2,000,000,001 epochs of 1,000 documents': must have an index that fits"
    ):
        samples[0]


def test_sets_with_too_few_tokens(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", [0, 1, 4])
    with pytest.raises(CorpusError, match=r"number of tokens in sequences \[0, 1\) of .* is 0: must be at least"):
        PackedSamples(corpus, 0, 1, sequence_length=4, num_samples=1, seed=1)
    with pytest.raises(CorpusError, match="is 4: must be at least 5"):
        PackedSamples(corpus, 2, 3, sequence_length=4, num_samples=None, seed=1)
    with pytest.raises(CorpusError, match="is 1: must be at least 2"):
        SequentialSamples(corpus, 0, 2, sequence_length=4)
    with pytest.raises(CorpusError, match=r"sequences \[1, 1\) of .* is 0"):
        SequentialSamples(corpus, 1, 1, sequence_length=4)


@pytest.mark.parametrize("kind", ["packed", "sequential"])
def test_no_sample_outside_the_order(tmp_path: Path, kind: str) -> None:
    corpus = make_corpus(tmp_path / "c", [9])
    samples = (
        PackedSamples(corpus, 0, 1, sequence_length=4, num_samples=2, seed=1)
        if kind == "packed"
        else SequentialSamples(corpus, 0, 1, sequence_length=4)
    )
    assert len(samples) == 2
    assert samples.name == corpus.prefix
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"sample {index} of .*, which has 2"):
            samples[index]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths[1:]) >= 2),
    sequence_length=st.integers(1, 12),
)
def test_every_held_out_token_is_a_label_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    """The set starts at the second document."""
    corpus = make_corpus(tmp_path_factory.mktemp("held") / "c", lengths)
    samples = SequentialSamples(corpus, 1, len(lengths), sequence_length=sequence_length)
    tokens = np.arange(lengths[0], sum(lengths))
    inputs, labels = [], []
    for index in range(len(samples)):
        sample = samples[index]
        assert sample.tokens.shape == (sequence_length + 1,)
        assert sample.tokens.dtype == np.int64
        assert sample.valid.any()
        inputs += sample.tokens[:-1][sample.valid].tolist()
        labels += sample.tokens[1:][sample.valid].tolist()
        assert (sample.tokens[1:][~sample.valid] == 0).all()
    assert inputs == tokens[:-1].tolist()
    assert labels == tokens[1:].tolist()
