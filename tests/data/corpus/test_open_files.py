"""Many corpora: the limit of open files is raised, and one error names it where that is not enough."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus
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
