"""Many corpora: few of their files are open at a time, whatever the limit, and one error names a limit that is too low."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.packing import PackedSamples
from megatron_slm.errors import CorpusError
from megatron_slm.files import raise_open_file_limit
from tests.data.corpora import make_corpus


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_the_most_allowed(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
    raise_open_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])


def test_too_many_open_files_are_one_named_error(tmp_path: Path, limits: tuple[int, int]) -> None:
    make_corpus(tmp_path / "c", [5])
    free = os.dup(0)
    os.close(free)  # the lowest free number: no other file can be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    with pytest.raises(CorpusError, match=r"corpus file is .*c.idx.*: must be readable \(Too many.*ulimit -n"):
        IndexedCorpus(tmp_path / "c")


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def samples_of_many(folder: Path, count: int) -> list[PackedSamples]:
    """Packed samples of many corpora, the first 50 of them with an index of their own on disk."""
    make_corpus(folder / "0", [9, 20])
    for number in range(1, count):
        for path in (bin_path, idx_path):
            shutil.copyfile(path(folder / "0"), path(folder / str(number)))
    return [
        PackedSamples(
            IndexedCorpus(folder / str(number)), 0, 2, sequence_length=4, num_samples=5, seed=number % 50,
            cache=IndexCache(folder / "cache"),
        )
        for number in range(count)
    ]  # fmt: skip


def read_all(orders: list[PackedSamples]) -> list[list[list[int]]]:
    return [[order[i].tokens.tolist() for i in range(len(order))] for order in orders]


def test_few_files_are_open_however_many_corpora_are_read(tmp_path: Path, limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * 24, limits[1]))  # so that 24 are kept open
    before = num_open()
    orders = samples_of_many(tmp_path, 40)
    found = read_all(orders)
    assert num_open() <= before + 24 + 2
    with ThreadPoolExecutor(4) as pool:  # as a run's reading threads
        assert all(rows == found for rows in pool.map(read_all, [orders] * 4))
    assert num_open() <= before + 24 + 2 * 4
    plain = PackedSamples(IndexedCorpus(tmp_path / "7"), 0, 2, sequence_length=4, num_samples=5, seed=7)
    assert read_all([plain]) == [found[7]]
    del orders, plain
    assert num_open() <= before + 2, "files of corpora that are no longer in use are closed"


@pytest.mark.slow
def test_ten_thousand_corpora_are_read_under_the_usual_limit(tmp_path: Path, limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    before = num_open()
    orders = samples_of_many(tmp_path, 10_000)
    assert all(order[0].tokens.size == 5 for order in orders)
    assert num_open() <= before + 256 + 2


def test_a_corpus_that_changes_while_it_is_read_is_an_error(tmp_path: Path, limits: tuple[int, int]) -> None:
    corpus = make_corpus(tmp_path / "c", [5, 6])
    np.testing.assert_array_equal(corpus.get(1), np.arange(5, 11))
    make_corpus(tmp_path / "c", [6, 5])
    np.testing.assert_array_equal(corpus.get(1), np.arange(5, 11), "the old one, while it is open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * 24, limits[1]))
    others = [make_corpus(tmp_path / str(i), [5]) for i in range(24)]
    assert sum(int(other.get(0).sum()) for other in others) == 240
    with pytest.raises(CorpusError, match="stay as it is while it is read"):
        corpus.get(1)
