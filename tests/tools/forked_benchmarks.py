"""Benchmarks whose processes are forked from a parent that has imported all, instead of started; a slow test starts them."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_slm.cli.score import main as score
from tests.support.world import run_world

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def benchmark(name: str) -> ModuleType:
    """The module of a benchmark."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


def run_forked(
    name: str, capsys: pytest.CaptureFixture[str], json_file: Path, *words: str
) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark with these words in this process; its records and what it prints."""
    module = benchmark(name)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args([*words, "--json", str(json_file)])) == 0
    return json.loads(json_file.read_text()), capsys.readouterr().out


def run_started(name: str, json_file: Path, *words: str) -> tuple[list[dict[str, Any]], str]:
    """Run the command `tools/benchmark.py NAME` with these words; its records and what it prints."""
    command = [sys.executable, str(TOOLS / "benchmark.py"), name, *words, "--json", str(json_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(json_file.read_text()), done.stdout


def fork_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks of every benchmark that starts a world."""
    monkeypatch.setattr(
        benchmark("world"), "run", lambda name, job, num_ranks: run_world(_rank, num_ranks, name, job)[0]
    )


def fork_process(name: str, job: dict[str, Any]) -> Any:
    """What one process of a benchmark finds."""
    return run_world(_rank, 1, name, job)[0]


def fork_scoring(flags: list[str]) -> None:
    """Run the scoring pass with these flags."""
    assert run_world(_score, 1, flags) == [0]


def _rank(name: str, job: dict[str, Any]) -> Any:
    return benchmark(name)._child(job)


def _score(flags: list[str]) -> int:
    return score(flags)
