"""A small selective run on the device and on the CPU: the same losses, the same tokens kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it is also the script of its runs

from gpu_checks import training
from gpu_checks.check import Outcome, Setting

_STEPS = 20
_LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
"""Largest relative difference of a step's loss: rounding that grows over the steps."""
_LEAST_ALIKE = {"fp32": 0.99, "bf16": 0.95}
"""Least share of the kept tokens of all steps that are the same."""


def parity(setting: Setting) -> Outcome:
    """Train 20 steps on both, in fp32 and in bf16, each with the backends that `auto` chooses there."""
    shape = training.TINY
    corpus = training.write_corpus(setting.folder / "corpus", shape, samples=200)
    reference = training.write_model(setting.folder / "reference", shape, device="cpu", seed=1)
    records = []
    for precision in ("fp32", "bf16"):
        flags = {
            **shape.flags(), "data-path": corpus, "reference-load": reference, "objective": "slm", "lr": 1e-3,
            "micro-batch-size": 2, "global-batch-size": 4, "train-iters": _STEPS, "bf16": precision == "bf16" or None,
        }  # fmt: skip
        ours, theirs = (
            _observed({**flags, "run-dir": setting.folder / f"{precision} {where}"}, environment)
            for where, environment in (("device", dict(os.environ)), ("cpu", training.on_cpu()))
        )
        losses = [abs(one / other - 1) for one, other in zip(ours["losses"], theirs["losses"], strict=True)]
        pairs = [(set(one), set(other)) for one, other in zip(ours["kept"], theirs["kept"], strict=True)]
        alike = sum(len(one & other) for one, other in pairs) / sum(len(one) for one, _ in pairs)
        records.append({
            "precision": precision, "largest loss difference": max(losses), "first step's": losses[0],
            "kept alike": alike, "last loss": ours["losses"][-1],
        })  # fmt: skip
    held = all(
        r["largest loss difference"] <= _LOSS_TOLERANCE[r["precision"]]
        and r["kept alike"] >= _LEAST_ALIKE[r["precision"]]
        for r in records
    )
    found = [
        f"{r['precision']}: losses within {r['largest loss difference']:.1e}, {r['kept alike']:.1%} kept alike"
        for r in records
    ]
    return Outcome(held=held, summary=f"{_STEPS} steps, {'; '.join(found)}", figures={"runs": records})


def _observed(flags: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Losses by step, and kept rows by micro-batch."""
    run_dir = Path(flags["run-dir"])
    line = training.command(flags, script=Path(__file__))
    print("+", *line, flush=True)
    done = subprocess.run(line, env=environment, stdout=sys.stdout, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"training ended with exit code {done.returncode}")
    losses = [step["loss"] for step in training.steps(run_dir)]
    return {"losses": losses, "kept": json.loads((run_dir / "kept.json").read_text())}


def _train_here(arguments: list[str]) -> None:
    """The training command, which also writes the kept rows of every micro-batch."""
    from megatron_slm.cli.command import choose_accelerator
    from megatron_slm.config.load import parse

    config, _ = parse(arguments)
    choose_accelerator()
    from megatron_slm.training.pretrain import pretrain

    kept: list[list[int]] = []
    pretrain(config, observer=lambda batch, loss_N, reference_N, kept_K: kept.append(kept_K.tolist()))
    (Path(config.logging.run_dir) / "kept.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    _train_here(sys.argv[1:])
