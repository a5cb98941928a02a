"""Console scripts and tools: each starts from any folder, and `--help` costs no torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.name not in ("benchmark.py", "gpu_check.py"))
HELP_SECONDS = 3.0
HEAVY = ("torch", "deepspeed", "transformers", "matplotlib")


def _help(target: str, folder: Path) -> tuple[str, list[str], float]:
    """Call the function of a console script with --help in `folder`: its output, heavy imports, CPU seconds."""
    module, function = target.split(":")
    code = (
        "import atexit, sys, time\n"
        f"atexit.register(lambda: sys.stderr.write('HEAVY ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules)"
        " + f' CPU {time.process_time()}\\n'))\n"
        "import os; os._exit = sys.exit\n"
        f"from {module} import {function}\n"
        f"{function}()\n"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    _, _, rest = done.stderr.rpartition("HEAVY ")
    heavy, _, seconds = rest.partition("CPU ")
    return done.stdout, heavy.split(), float(seconds)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_is_quick_and_imports_nothing_heavy(script: str, tmp_path: Path) -> None:
    text, heavy, seconds = _help(SCRIPTS[script], tmp_path)
    assert text.startswith("usage: ")
    assert not heavy
    assert seconds < HELP_SECONDS


def test_every_command_is_a_console_script_and_a_tool() -> None:
    called = {target.partition(":")[2] for target in SCRIPTS.values()}
    for tool in TOOLS:
        lines = (ROOT / "tools" / tool).read_text().splitlines()
        assert lines[-1].strip().removesuffix("()") in called, tool
        assert len(lines) <= 10, f"{tool} is more than a shim"
    assert len(called) == len(SCRIPTS) == len(TOOLS)


@pytest.mark.parametrize("tool", ["pretrain_slm.py", "score_corpus.py", "plan.py"])
def test_a_misspelled_flag_is_refused_quickly(tool: str, tmp_path: Path) -> None:
    words = ["layout", "--gpu", "h100"] if tool == "plan.py" else []
    command = [sys.executable, str(ROOT / "tools" / tool), *words, "--train-itrs", "5"]
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < HELP_SECONDS
