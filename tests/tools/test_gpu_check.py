"""The GPU check without a GPU: it finds wrong kernels, goes on after failures, crashes and hangs, and writes a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CHECKS = """
import os, sys, time
sys.path.insert(0, {tools!r})
from gpu_checks import every, main
from gpu_checks.check import Check, Outcome, SkipCheck

def held(setting):
    return Outcome(held=True, summary="all | well", figures={{"ratio": 0.123456, "cases": [{{"a": 1}}, {{"b": None}}]}})

def wrong(setting):
    return Outcome(held=False, summary="off by one")

def raises(setting):
    print("what led to it")
    raise ValueError("no such thing")

def crashes(setting):
    os.abort()

def hangs(setting):
    time.sleep(600)

def skips(setting):
    raise SkipCheck("needs a Hopper GPU")

main.CHECKS = tuple(
    Check(name=run.__name__, what="", run=run, limit_seconds=3 if run is hangs else 60)
    for run in (wrong, raises, crashes, hangs, skips, held)
)
main._count_gpus = lambda: 0
sys.exit(main.main())
"""


def test_it_goes_on_after_whatever_happens(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(CHECKS.format(tools=str(TOOLS)))
    done = subprocess.run([sys.executable, script, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {check["name"]: (check["status"], check["summary"]) for check in found["checks"]} == {
        "wrong": ("failed", "off by one"),
        "raises": ("failed", "ValueError: no such thing"),
        "crashes": ("failed", "ended with exit code -6 and without a result"),
        "hangs": ("failed", "did not end within 3 s"),
        "skips": ("skipped", "needs a Hopper GPU"),
        "held": ("held", "all | well"),
    }
    assert found["small"]
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "failed: wrong, raises, crashes, hangs" in page
    assert "| held | held | " in page
    assert "all \\| well" in page
    assert "what led to it" in page
    assert "| a | b |\n| --- | --- |\n| 1 |  |\n|  |  |\n" in page
    assert "- ratio: 0.1235" in page
    assert "held     held" in done.stdout


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    from gpu_checks import check, kernels

    return kernels, check.Setting(folder=Path(), small=True, num_gpus=0)


def test_kernels_hold_here(checks: Any) -> None:
    kernels, setting = checks
    from gpu_checks.elementwise import elementwise

    for check in (kernels.loss_kernels, kernels.attention, kernels.loss_head_speed, elementwise):
        outcome = check(setting)
        assert outcome.held, outcome.summary
        assert outcome.figures


def test_a_wrong_loss_is_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slm.loss.torch_backend import TorchKernels

    kernels, setting = checks
    real = TorchKernels.gradient

    def five_percent_off(*args: Any, out_KB: torch.Tensor, **named: Any) -> None:
        real(*args, out_KB=out_KB, **named)
        out_KB.mul_(1.05)

    monkeypatch.setattr(TorchKernels, "gradient", five_percent_off)
    assert not kernels.loss_kernels(setting).held


def test_a_wrong_attention_is_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slm.model import sdpa

    kernels, setting = checks
    real = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda q, k, v, window, **named: real(q, k, v, window and window + 1, **named))
    assert not kernels.attention(setting).held


def test_a_wrong_rotation_is_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks.elementwise import elementwise

    from megatron_slm.model import fused

    monkeypatch.setattr(fused, "rotate_back", lambda grad, cos, sin: fused.rotate_in_steps(grad, cos, sin))
    assert not elementwise(checks[1]).held


EVERY = (
    "environment", "loss-kernels", "attention", "element-wise", "parity", "loss-head", "step-1b", "step-7b",
    "schedules", "lost-rank",
)  # fmt: skip


def test_every_check_has_a_test(checks: Any) -> None:
    from gpu_checks.every import CHECKS

    assert tuple(check.name for check in CHECKS) == EVERY


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, run the check itself")
@pytest.mark.parametrize("name", EVERY)
def test_the_check_on_a_cpu(name: str, tmp_path: Path) -> None:
    """One by one: together they take longer than a test may."""
    command = [sys.executable, TOOLS / "gpu_check.py", "--output", tmp_path, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(check["name"], check["status"]) for check in found["checks"]] == [(name, "held")]
    assert sorted(path.name for path in tmp_path.glob("tmp*")) == []
