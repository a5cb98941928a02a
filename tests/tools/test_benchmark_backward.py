"""The backward pass' benchmark runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.forked_benchmarks import benchmark, fork_process, run_forked, run_started


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_quick(
    forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, words = tmp_path / "found.json", ["--quick", "--rounds", "1"]
    if forked:
        monkeypatch.setattr(benchmark("backward"), "_spawn", lambda job, malloc: fork_process("backward", job))
        found, printed = run_forked("backward", capsys, json_file, *words)
    else:
        found, printed = run_started("backward", json_file, *words)
    records = {record["name"]: record for record in found}
    assert list(records) == ["exact", "sampled 0.02", "sampled 0.7", "kept"]
    keys = {"name", "keep", "share", "step_ratio", "spread", "backward_ratio", "variance", "memory_ratio"}
    assert all(record.keys() == keys and record["keep"] == 0.6 for record in records.values())
    assert {name: record["variance"] for name, record in records.items() if record["share"] in (1.0, 0.6016)} == {
        "exact": None, "kept": None,
    }  # fmt: skip
    # of the last of two blocks only the kept tokens' rows have a gradient
    assert records["sampled 0.7"]["share"] == round((90 + 77) / 2 / 128, 4)
    assert 0 < records["sampled 0.7"]["variance"] < 0.1
    assert "| sampled 0.7 | 0.6 |" in printed
