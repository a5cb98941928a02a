"""The benchmark of saves runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.forked_benchmarks import fork_ranks, run_forked, run_started


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_quick(
    forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, words = tmp_path / "found.json", ["--quick", "--rounds", "2", "--folder", str(tmp_path)]
    if forked:
        fork_ranks(monkeypatch)
        records, printed = run_forked("checkpoint", capsys, json_file, *words)
    else:
        records, printed = run_started("checkpoint", json_file, *words)
    found = {record["kind"]: record for record in records}
    assert set(found) == {"synchronous", "asynchronous"}
    assert found["synchronous"]["num_bytes"] == found["asynchronous"]["num_bytes"] > 12 * 3_700_000
    assert found["synchronous"]["blocked_share"] == 1.0
    assert 0 < found["asynchronous"]["blocked_share"] < 1.0
    assert found["asynchronous"]["blocked_seconds"] < found["asynchronous"]["until_committed_seconds"]
    assert "| asynchronous |" in printed
