"""The pipeline's benchmark runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "pipeline", "--quick", "--rounds", "7", "--unit-ms", "15"]
    done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "found.json").read_text())
    assert {(r["stages"], r["micro_batches"], r["emulated"]) for r in records} == {(2, 4, True)}
    predicted = {r["mode"]: (r["predicted"], r["lower_bound"]) for r in records}
    assert predicted["clm"] == (1.0, 1.0)
    assert predicted["ride-along"] == (1.2667, 1.0667)
    assert predicted["skewed"] == (1.0667, 1.0667)
    assert predicted["skewed-rows"][0] < 0.91
    assert predicted["stored scores + rows"][0] == pytest.approx((1 + 2 * 0.68) / 3, abs=1e-3)
    ratios = {r["mode"]: r["ratio"] for r in records}
    assert ratios["clm"] == 1.0
    assert ratios["skewed"] < ratios["ride-along"]
    assert ratios["stored scores + rows"] < ratios["skewed-rows"] < ratios["skewed"]
    assert "| skewed | 2 | 4 |" in done.stdout
