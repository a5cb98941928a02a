"""Errors of many ranks: each distinct traceback once on the terminal, every one in its rank's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm import log
from megatron_slm.log import Reports, print_traceback, report_in


@pytest.fixture(autouse=True)
def alone_afterwards() -> Iterator[None]:
    yield
    report_in(None)


def one(rank: int) -> RuntimeError:
    try:
        raise RuntimeError(f"out of files on rank {rank}")
    except RuntimeError as error:
        return error


def other() -> ValueError:
    try:
        raise ValueError("another")
    except ValueError as error:
        return error


def printed(folder: Path, rank: int, error: Exception, capsys: pytest.CaptureFixture[str], launch: str = "one") -> str:
    report_in(Reports(folder, rank, launch))
    print_traceback(error)
    return capsys.readouterr().err


def test_a_traceback_through_the_same_lines_is_printed_by_one_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(tmp_path, 3, one(3), capsys).count("Traceback") == 1
    assert [printed(tmp_path, rank, one(rank), capsys) for rank in (0, 1, 2)] == [""] * 3
    assert "ValueError: another" in printed(tmp_path, 1, other(), capsys)
    for rank in range(4):
        assert f"RuntimeError: out of files on rank {rank}" in (tmp_path / f"rank-{rank:04d}.txt").read_text()
    assert "ValueError: another" in (tmp_path / "rank-0001.txt").read_text()


def test_another_launch_prints_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(tmp_path, 0, one(0), capsys)
    assert printed(tmp_path, 0, one(0), capsys, launch="two")
    Reports(tmp_path, 0, "three").clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0000.txt"]


def test_where_nothing_can_be_written_every_rank_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for rank in (0, 1):
        assert "Traceback" in printed(tmp_path / "file", rank, one(rank), capsys)


def test_one_error_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = one(0)
    assert printed(tmp_path, 0, error, capsys)
    assert not printed(tmp_path / "elsewhere", 0, error, capsys)
    assert log._printed[-1] is error
