"""`tools/checkpoint.py` over folders of checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.checkpoint.retention import record_evaluation
from megatron_slm.cli.checkpoint import main
from tests.checkpoint.test_format import write

TOOL = Path(__file__).resolve().parents[2] / "tools" / "checkpoint.py"


def test_a_table_of_what_there_is(tmp_path: Path) -> None:
    for step in (5, 10):
        write(tmp_path, step)
        record_evaluation(tmp_path, step, {"clean": 2.0 + step})
    done = subprocess.run([sys.executable, str(TOOL), "list", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "step_" in line]
    assert rows == [
        ["step_00000005", "40", "0.0", "pipeline 1", "7.0000", "complete"],
        ["step_00000010", "80", "0.0", "pipeline 1", "12.0000", "complete"],
    ]


def test_damage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole (1 files") == 3
    (tmp_path / "step_00000010" / "weights_00000.safetensors").write_bytes(b"Weights" * 10)
    assert main(["list", str(tmp_path)]) == 0, "sizes alone"
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", str(tmp_path / "step_00000005")]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(":")[0:2] for line in lines[:3]] == [
        ["step_00000005", " whole (1 files, 35 bytes)"],
        ["step_00000010", " DAMAGED"],
        ["step_00000015", " whole (1 files, 105 bytes)"],
    ]
    assert "weights_00000.safetensors" in lines[1]
    (tmp_path / "step_00000015" / "manifest.json").unlink()
    assert main(["list", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 1
    assert "error: FOLDER is " in capsys.readouterr().err
