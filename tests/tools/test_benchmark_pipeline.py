"""The pipeline's benchmark runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tools.forked_benchmarks import benchmark, fork_ranks, fork_scoring, run_forked, run_started


def check(records: list[dict[str, Any]], printed: str) -> None:
    assert {(r["stages"], r["micro_batches"], r["emulated"]) for r in records} == {(2, 4, True)}
    predicted = {r["mode"]: (r["predicted"], r["lower_bound"]) for r in records}
    assert predicted["clm"] == (1.0, 1.0)
    assert predicted["ride-along"] == (1.2667, 1.0667)
    assert predicted["skewed"] == (1.0667, 1.0667)
    assert predicted["skewed-rows"][0] < 0.91
    assert predicted["stored scores + rows"][0] == pytest.approx((1 + 2 * 0.68) / 3, abs=1e-3)
    assert {r["mode"]: r["ratio"] for r in records}["clm"] == 1.0
    assert "| skewed | 2 | 4 |" in printed


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fork_ranks(monkeypatch)
    pipeline = benchmark("pipeline")
    monkeypatch.setattr(
        pipeline,
        "_store_scores",
        lambda job: fork_scoring([*pipeline._flags({**job, "stages": 1}), "--output", f"{job['folder']}/scores"]),
    )
    words = ["--quick", "--rounds", "1", "--unit-ms", "1"]
    records, printed = run_forked("pipeline", capsys, tmp_path / "found.json", *words)
    check(records, printed)
    assert all(r["ratio"] > 0 for r in records)


@pytest.mark.slow
def test_measured_times_are_in_the_order_of_the_predicted_ones(tmp_path: Path) -> None:
    words = ["--quick", "--rounds", "7", "--unit-ms", "15"]
    records, printed = run_started("pipeline", tmp_path / "found.json", *words)
    check(records, printed)
    ratios = {r["mode"]: r["ratio"] for r in records}
    assert ratios["skewed"] < ratios["ride-along"]
    assert ratios["stored scores + rows"] < ratios["skewed-rows"] < ratios["skewed"]
