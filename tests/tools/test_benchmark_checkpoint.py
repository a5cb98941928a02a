"""The benchmark of saves runs, and its records are what readers of its JSON expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "checkpoint", "--quick", "--rounds", "2", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {record["kind"]: record for record in json.loads((tmp_path / "found.json").read_text())}
    assert set(found) == {"synchronous", "asynchronous"}
    assert found["synchronous"]["num_bytes"] == found["asynchronous"]["num_bytes"] > 12 * 3_700_000
    assert found["synchronous"]["blocked_share"] == 1.0
    assert 0 < found["asynchronous"]["blocked_share"] < 1.0
    assert found["asynchronous"]["blocked_seconds"] < found["asynchronous"]["until_committed_seconds"]
    assert "| asynchronous |" in done.stdout
