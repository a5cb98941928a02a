"""Metrics of a run, read from its folder, as series over tokens, time or steps."""

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

from megatron_slm.arithmetic import ceil_div
from megatron_slm.errors import AnalysisError

METRICS = "metrics.jsonl"
SMOOTHING_SHARE = 0.03
"""Width of the running mean of training series, as a share of the logged steps."""
MAX_POINTS = 600
"""Largest number of points of a training series: more are invisible and slow down the page."""

Axis = Literal["tokens", "trained-tokens", "hours", "steps"]
AXIS_LABELS: dict[Axis, str] = {
    "tokens": "tokens read (millions)",
    "trained-tokens": "tokens trained on (millions)",
    "hours": "training time (hours)",
    "steps": "steps",
}


@dataclass(frozen=True)
class Series:
    """Values over an axis, in training order."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.x)

    def reaches(self, value: float) -> float | None:
        """Return the first position with a value of at most `value`, linear between points; None if there is none."""
        points = list(zip(self.x, self.y, strict=True))
        if points and points[0][1] <= value:
            return points[0][0]
        for (before, high), (after, low) in pairwise(points):
            if low <= value < high:
                return before + (after - before) * (high - value) / (high - low)
        return None


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Logged metrics of one run, one dictionary per line of metrics.jsonl."""

    name: str
    folder: Path
    training: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    probes: tuple[dict[str, Any], ...]
    config: Mapping[str, Any]
    unreadable_lines: int
    """Incomplete lines: the last line of a killed or running run."""

    @property
    def last_step(self) -> int:
        """Last logged step."""
        return max((line["step"] for line in (*self.training, *self.evaluations)), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Length of the run by its configuration; None if unknown."""
        return self.config.get("train_iters")

    @property
    def is_unfinished(self) -> bool:
        """True if steps are known to be missing."""
        return self.planned_steps is not None and self.last_step < self.planned_steps

    @property
    def status(self) -> str:
        """Progress of the run as text."""
        if self.planned_steps is None:
            return f"{self.last_step:,} steps"
        if self.is_unfinished:
            return f"{self.last_step:,} of {self.planned_steps:,} steps"
        return f"complete, {self.planned_steps:,} steps"

    @property
    def set_names(self) -> list[str]:
        """Held-out sets with a finite loss, in the order of their first evaluation."""
        return list(dict.fromkeys(line["set"] for line in self.evaluations if line["loss"] is not None))

    def metric(self, key: str, axis: Axis, *, smooth: bool = True) -> Series:
        """Return a training metric, skipping lines without it; a running mean by default."""
        lines = [line for line in self.training if _is_number(line.get(key))]
        values = [float(line[key]) for line in lines]
        width = max(1, round(len(values) * SMOOTHING_SHARE)) if smooth else 1
        stride = max(1, ceil_div(len(values), MAX_POINTS))
        ends = range(len(values), 0, -stride)[::-1]  # always includes the last value
        means = [fmean(values[max(0, end - width) : end]) for end in ends]
        return Series(tuple(self.position(axis, lines[end - 1]["step"]) for end in ends), tuple(means))

    def held_out(self, name: str, axis: Axis = "tokens") -> Series:
        """Return the loss on a held-out set."""
        lines = [line for line in self.evaluations if line["set"] == name and _is_number(line["loss"])]
        return Series(
            tuple(self.position(axis, line["step"]) for line in lines), tuple(float(line["loss"]) for line in lines)
        )

    def agreement(self, axis: Axis) -> Series:
        """Return the share of each probe's selection that the previous probe made too."""
        lines = [line for line in self.probes if _is_number(line.get("agreement"))]
        return Series(
            tuple(self.position(axis, line["step"]) for line in lines), tuple(line["agreement"] for line in lines)
        )

    def position(self, axis: Axis, step: int) -> float:
        """Return the position of a step on an axis, linear between logged steps; NaN without any."""
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
        """Logged steps and their positions, by axis; steps between two logged ones count like the later one."""
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
    """Read the metrics of a run, finished or not.

    Args:
        name: name of the run in reports; default: its folder's name.

    Raises:
        AnalysisError: the folder holds no metrics.
    """
    folder = Path(folder)
    path = folder / METRICS
    if not path.is_file():
        raise AnalysisError(
            "RUN", str(folder), f"be a run's folder (with a {METRICS})", "name the --run-dir of a training run"
        )
    lines: list[dict[str, Any]] = []
    unreadable = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
        else:
            lines.append(line)
    if not lines:
        raise AnalysisError(
            f"{path}: number of readable lines", 0, "be at least 1", "wait until the first step is logged"
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
    """Read several runs, each `FOLDER` or `NAME=FOLDER`.

    Raises:
        AnalysisError: a folder holds no metrics, or two runs have the same name.
    """
    runs = []
    for text in named:
        name, separator, folder = text.rpartition("=")
        runs.append(read_run(folder if separator else text, name=name or None))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise AnalysisError(
                "RUN: name", name, "differ from the names of the other runs", "name the runs: clm=runs/a clm-2=runs/b"
            )
    return runs


def held_out_sets(runs: Iterable[RunMetrics]) -> list[str]:
    """Return the held-out sets of all runs, each once."""
    return list(dict.fromkeys(name for run in runs for name in run.set_names))


def _config(folder: Path) -> Mapping[str, Any]:
    """Read a run's configuration, with underscores in its names; empty if it is missing or unreadable."""
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
