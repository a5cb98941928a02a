"""The benchmark of cut sequences runs, and compares with what its report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tools.forked_benchmarks import fork_ranks, run_forked, run_started


def check(record: dict[str, Any], printed: str) -> None:
    expected = record["half_step_seconds"] + record["gather_seconds"]
    assert record["ratio"] == pytest.approx(record["step_seconds"] / expected, rel=0.02)
    assert 0 < record["gather_seconds"] < record["step_seconds"]
    assert f"| 2 | {record['step_seconds']:.3f} |" in printed


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fork_ranks(monkeypatch)
    [record], printed = run_forked("context", capsys, tmp_path / "found.json", "--quick", "--unit-ms", "1")
    check(record, printed)


@pytest.mark.slow
def test_computation_is_that_of_half_a_sequence(tmp_path: Path) -> None:
    [record], printed = run_started("context", tmp_path / "found.json", "--rounds", "3", "--unit-ms", "20")
    check(record, printed)
    least = 4 * 4 * 0.020  # micro-batches, forward and backward passes and the reference's
    assert least < record["half_step_seconds"] < record["step_seconds"] < 2 * record["half_step_seconds"]
