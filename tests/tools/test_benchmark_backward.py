"""The backward pass' benchmark runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "backward", "--quick", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = {record["name"]: record for record in json.loads((tmp_path / "found.json").read_text())}
    assert list(records) == ["exact", "sampled 0.02", "sampled 0.7", "kept"]
    keys = {"name", "keep", "share", "step_ratio", "spread", "backward_ratio", "variance", "memory_ratio"}
    assert all(record.keys() == keys and record["keep"] == 0.6 for record in records.values())
    assert {name: record["variance"] for name, record in records.items() if record["share"] in (1.0, 0.6016)} == {
        "exact": None, "kept": None,
    }  # fmt: skip
    assert records["sampled 0.7"]["share"] == 90 / 128 or records["sampled 0.7"]["share"] == 0.7031
    assert 0 < records["sampled 0.7"]["variance"] < 0.1
    assert "| sampled 0.7 | 0.6 |" in done.stdout
