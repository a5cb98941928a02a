"""The command, started by the real launchers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import flags, run_flags, write_corpus
from tests.tools.test_launch import BIN, launchers


@pytest.mark.parametrize("name", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_preflight(name: str, tmp_path: Path) -> None:
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", preflight_link_seconds=0.05)
    command = [*launchers()[name], "tools/preflight.py", *flags(values), "--json", str(tmp_path / "out.json")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200,
        env={**environment, "PATH": f"{BIN}:{environment['PATH']}", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Preflight: ready" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["ready"]
