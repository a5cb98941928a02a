"""Several GPUs: the reference's schedules, tensor parallelism, and a rank that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import psutil

from gpu_checks import training
from gpu_checks.check import Outcome, Setting

_MODES = ("skewed", "bubble", "ride-along", "sequential")
_LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2": {"pipeline-model-parallel-size": 2},
    "TP2": {"tensor-model-parallel-size": 2},
    "TP2 SP": {"tensor-model-parallel-size": 2, "sequence-parallel": True},
    "DP2": {},
}
_STEPS = 6
_END_SECONDS = 90
"""Time in which all ranks must have ended after one was killed; 60 s without a heartbeat name it."""


def _flags(setting: Setting, *, steps: int) -> dict[str, Any]:
    shape = training.TINY
    corpus, reference = setting.folder / "corpus", setting.folder / "reference"
    training.write_corpus(corpus, shape, samples=200)
    training.write_model(reference, shape, device="cpu", seed=1)
    return {
        **shape.flags(), "data-path": corpus, "reference-load": reference, "objective": "slm", "lr": 1e-3,
        "micro-batch-size": 2, "global-batch-size": 16, "train-iters": steps,
    }  # fmt: skip


def schedules(setting: Setting) -> Outcome:
    """Losses of every reference schedule at PP2 bit by bit, and of every layout of two ranks to rounding."""
    flags = _flags(setting, steps=_STEPS)
    losses: dict[str, list[float]] = {}
    for mode in _MODES:
        run = {**flags, **_LAYOUTS["PP2"], "reference-schedule": mode, "run-dir": setting.folder / mode}
        losses[f"PP2 {mode}"] = [line["loss"] for line in training.train(run, processes=2)]
    for layout, changes in _LAYOUTS.items():
        if layout != "PP2":
            run = {**flags, **changes, "run-dir": setting.folder / layout.replace(" ", "-")}
            losses[layout] = [line["loss"] for line in training.train(run, processes=2)]
    first = losses[f"PP2 {_MODES[0]}"]
    differ = [name for name in losses if name.startswith("PP2") and losses[name] != first]
    far = [
        name for name, found in losses.items() if max(abs(a / b - 1) for a, b in zip(found, first, strict=True)) > 2e-3
    ]
    summary = f"{len(losses)} runs of {_STEPS} steps"
    summary += (
        f"; schedules that change the loss: {', '.join(differ)}" if differ else "; all schedules have the same bits"
    )
    summary += f"; layouts beyond rounding: {', '.join(far)}" if far else "; all layouts agree"
    return Outcome(held=not differ and not far, summary=summary, figures={"losses": losses})


def lost_rank(setting: Setting) -> Outcome:
    """Kill rank 1 in the middle of a run: the other one names it and ends."""
    run_dir = setting.folder / "run"
    flags = {**_flags(setting, steps=100_000), **_LAYOUTS["PP2"], "run-dir": run_dir}
    # without a launcher, which would end the other rank by itself
    port = 20000 + os.getpid() % 20000
    logs = [setting.folder / f"rank-{rank}.txt" for rank in (0, 1)]
    ranks = []
    for rank, log in enumerate(logs):
        placed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in placed.items()}
        with log.open("w") as file:
            ranks.append(subprocess.Popen(training.command(flags), stdout=file, stderr=file, env=environment))
    try:
        deadline = time.monotonic() + 120
        while len(training.steps(run_dir)) < 3:
            if any(rank.poll() is not None for rank in ranks) or time.monotonic() > deadline:
                raise RuntimeError(f"the run did not reach step 3: {logs[0].read_text()[-2000:]}")
            time.sleep(0.2)
        _kill_tree(ranks[1].pid)
        struck = time.monotonic()
        try:
            ranks[0].wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(held=False, summary=f"rank 0 still ran {_END_SECONDS} s after rank 1 was killed")
        seconds = time.monotonic() - struck
    finally:
        for rank in ranks:
            if rank.poll() is None:
                _kill_tree(rank.pid)
    output = logs[0].read_text()
    print(output)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    names_it = len(errors) == 1 and "rank 1 (" in errors[0]
    summary = (
        f"ended after {seconds:.0f} s with exit code {ranks[0].returncode}: {errors[0] if errors else 'no error line'}"
    )
    return Outcome(
        held=names_it and ranks[0].returncode not in (0, None), summary=summary, figures={"seconds": seconds}
    )


def _kill_tree(pid: int) -> None:
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        process.send_signal(signal.SIGKILL)
