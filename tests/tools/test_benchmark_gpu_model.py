"""The roofline model runs without a GPU, and its records are what readers of its JSON expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_gpu import TOOLS

sys.path.insert(0, str(TOOLS))

from fake_gpu.build import NoCompilerError, compiler


def modelled(tmp_path: Path, *flags: str) -> dict[tuple[str, str], dict[str, Any]]:
    try:
        compiler()
    except NoCompilerError as error:
        pytest.skip(str(error))
    command = [sys.executable, str(TOOLS / "benchmark.py"), "gpu-model", *flags, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "found.json").read_text())
    for eager, compiled in zip(records[0::4], records[2::4], strict=True):
        assert (eager["blocks"], compiled["blocks"]) == ("eager", "compiled")
        assert 1.05 < compiled["mfu"] / eager["mfu"] < 1.6
    return {(record["name"], record["objective"]): record for record in records if record["blocks"] == "eager"}


def check(found: dict[tuple[str, str], dict[str, Any]], name: str, gpu: str) -> None:
    clm, slm = found[name, "clm"], found[name, "slm"]
    assert clm["modelled"] is True
    assert clm["gpu"] == slm["gpu"] == gpu
    assert 0.2 < slm["mfu"] < clm["mfu"] < 0.6
    assert slm["tokens_per_second"] < clm["tokens_per_second"]
    assert slm["by_part"]["head backward"] < clm["by_part"]["head backward"], "only kept rows have gradients"
    assert slm["by_part"]["reference block"] == pytest.approx(slm["by_part"]["block forward"], rel=0.05)
    assert 1.8 < clm["by_part"]["block backward"] / clm["by_part"]["block forward"] < 2.8


def test_one_model(tmp_path: Path) -> None:
    check(modelled(tmp_path, "--models", "1b"), "1b", "h100")


@pytest.mark.slow
def test_all_models_and_a_faster_memory(tmp_path: Path) -> None:
    h100, h200 = modelled(tmp_path), modelled(tmp_path, "--gpu", "h200")
    for name in ("1b", "7b", "70b"):
        check(h100, name, "h100")
        assert h200[name, "clm"]["mfu"] > h100[name, "clm"]["mfu"]
