"""What a run's folder tells: its metrics, as curves over tokens or time."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from megatron_slm.errors import AnalysisError

METRICS = "metrics.jsonl"
SMOOTHING_SHARE = 0.03
"""Width of the running mean of training curves, as a share of the logged steps."""
MOST_POINTS = 600
"""Of a training curve that is drawn: more are not seen, and make a page heavy."""

Axis = Literal["tokens", "trained-tokens", "hours", "steps"]
AXIS_LABELS: dict[Axis, str] = {
    "tokens": "tokens read (millions)",
    "trained-tokens": "tokens trained on (millions)",
    "hours": "training time (hours)",
    "steps": "steps",
}


@dataclass(frozen=True)
class Curve:
    """Values over an axis, in the order of the run."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.x)

    def reaches(self, value: float) -> float | None:
        """Where the curve first falls to `value`, linear between points; None if it never does."""
        points = list(zip(self.x, self.y, strict=True))
        if points and points[0][1] <= value:
            return points[0][0]
        for (before, high), (after, low) in pairwise(points):
            if low <= value < high:
                return before + (after - before) * (high - value) / (high - low)
        return None


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The logged lines of one run."""

    name: str
    folder: Path
    training: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    probes: tuple[dict[str, Any], ...]
    config: Mapping[str, Any]
    unreadable_lines: int
    """Lines that are not whole: the last one of a run that was killed, or is being written to."""

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in (*self.training, *self.evaluations)), default=0)

    @property
    def status(self) -> str:
        """How far the run is."""
        planned = self.config.get("train_iters")
        if planned is None:
            return f"{self.last_step:,} steps"
        if self.last_step >= planned:
            return f"complete, {planned:,} steps"
        return f"{self.last_step:,} of {planned:,} steps"

    @property
    def set_names(self) -> list[str]:
        """Held-out sets with a finite loss, in the order they were first evaluated."""
        return list(dict.fromkeys(line["set"] for line in self.evaluations if line["loss"] is not None))

    def curve(self, key: str, axis: Axis, *, smooth: bool = True) -> Curve:
        """What training lines say under `key`, without the lines that say nothing; a running mean by default."""
        lines = [line for line in self.training if _is_number(line.get(key))]
        values = [float(line[key]) for line in lines]
        width = max(1, round(len(values) * SMOOTHING_SHARE)) if smooth else 1
        stride = max(1, -(-len(values) // MOST_POINTS))
        ends = range(len(values), 0, -stride)[::-1]  # the last value is always there
        means = [fmean(values[max(0, end - width) : end]) for end in ends]
        return Curve(tuple(self.position(axis, lines[end - 1]["step"]) for end in ends), tuple(means))

    def held_out(self, name: str, axis: Axis = "tokens") -> Curve:
        """The loss on a held-out set."""
        lines = [line for line in self.evaluations if line["set"] == name and _is_number(line["loss"])]
        return Curve(
            tuple(self.position(axis, line["step"]) for line in lines), tuple(float(line["loss"]) for line in lines)
        )

    def agreement(self, axis: Axis) -> Curve:
        """How much of the selection on the fixed batch is the one of the probe before."""
        lines = [line for line in self.probes if _is_number(line.get("agreement"))]
        return Curve(
            tuple(self.position(axis, line["step"]) for line in lines), tuple(line["agreement"] for line in lines)
        )

    def position(self, axis: Axis, step: int) -> float:
        """Where a step is on an axis: linear between the logged steps."""
        steps, values = self._positions[axis]
        if not steps:
            return math.nan
        at = bisect_left(steps, step)
        if at == len(steps):
            return values[-1]
        low_step, low = (steps[at - 1], values[at - 1]) if at else (0, 0.0)
        share = (step - low_step) / (steps[at] - low_step)
        return low + share * (values[at] - low)

    @cached_property
    def _positions(self) -> dict[Axis, tuple[list[int], list[float]]]:
        """By axis: logged steps, and what the axis says there. Lines between logged steps are like the logged one."""
        lines = [line for line in self.training if line.get("step")]
        steps = [line["step"] for line in lines]
        spans = [step - before for before, step in pairwise([0, *steps])]

        def summed(value: Callable[[dict[str, Any]], float]) -> list[float]:
            return list(accumulate(span * value(line) for span, line in zip(spans, lines, strict=True)))

        all_steps = steps or sorted({line["step"] for line in self.evaluations})
        tokens = {line["step"]: line["tokens"] / 1e6 for line in (*self.evaluations, *lines) if "tokens" in line}
        return {
            "steps": (all_steps, [float(step) for step in all_steps]),
            "tokens": (all_steps, [tokens.get(step, math.nan) for step in all_steps]),
            "trained-tokens": (steps, summed(lambda line: (line.get("kept_tokens") or 0.0) / 1e6)),
            "hours": (steps, summed(lambda line: (line.get("step_time_seconds") or 0.0) / 3600)),
        }


def read_run(folder: str | Path, *, name: str | None = None) -> RunMetrics:
    """Read a run's folder, finished or not.

    Args:
        name: what the run is called in the report; default: its folder's name.

    Raises:
        AnalysisError: there are no metrics in it.
    """
    folder = Path(folder)
    path = folder / METRICS
    if not path.is_file():
        raise AnalysisError(
            "RUN",
            str(folder),
            f"is a run's folder, with a {METRICS} in it",
            "give the --run-dir of tools/pretrain_slm.py",
        )
    lines: list[dict[str, Any]] = []
    unreadable = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += bool(text.strip())
            continue
        lines.append(line)
    if not lines:
        raise AnalysisError(
            str(path), f"{unreadable} unreadable lines", "holds at least one line of metrics", "wait for the first step"
        )
    return RunMetrics(
        name=name or folder.resolve().name,
        folder=folder,
        training=tuple(line for line in lines if "event" not in line),
        evaluations=tuple(line for line in lines if line.get("event") == "eval" and "set" in line and "loss" in line),
        probes=tuple(line for line in lines if line.get("event") == "probe"),
        config=_config(folder),
        unreadable_lines=unreadable,
    )


def read_runs(named: Sequence[str]) -> list[RunMetrics]:
    """Read several runs, each `FOLDER` or `NAME=FOLDER`; names are made unlike.

    Raises:
        AnalysisError: there are no metrics in one of them, or a name is there twice.
    """
    runs = []
    for text in named:
        name, separator, folder = text.rpartition("=")
        runs.append(read_run(folder if separator else text, name=name or None))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise AnalysisError("RUN", name, "is a name of one run only", "name them: clm=runs/a clm-2=runs/b")
    return runs


def held_out_sets(runs: Iterable[RunMetrics]) -> list[str]:
    """The held-out sets of all runs, each once."""
    return list(dict.fromkeys(name for run in runs for name in run.set_names))


def _config(folder: Path) -> Mapping[str, Any]:
    """The run's configuration with underscores in its names; empty where there is none that can be read."""
    path = folder / "config.yaml"
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(loaded, dict):
        return {}
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
