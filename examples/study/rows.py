"""Backward passes on sampled rows in the study: which runs compare them, and the page of those that are finished."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from megatron_slm.files import write_durably
from megatron_slm.pages.charts import COLORS, MARKERS, Curve, Panel, png

if TYPE_CHECKING:
    from results import Results

    from megatron_slm.analysis.runs import RunMetrics

SEEDS = (1, 2, 3, 4, 5)
KEEP_RATIO = 0.6
SAMPLED = ("--backward-rows", "sampled", "--backward-row-variance", "0.02")
METHODS: dict[str, tuple[str, ...]] = {
    "rows-0.02": SAMPLED,
    "rows-share": ("--backward-rows", "sampled", "--backward-row-share", "0.6"),
    "rows-kept": ("--backward-rows", "kept"),
}
"""What is compared with the exact backward pass, by the name of its runs."""
CLEAN = "clean-rows"
"""CLM on the curated corpus as the reference is trained, with sampled rows."""
BENCHMARK = {"exact": "exact", "rows-0.02": "sampled 0.02", "rows-share": "sampled 0.6", "rows-kept": "kept"}
"""Names in docs/benchmarks/backward.json."""
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def gain_kept(method: Mapping[int, float], exact: Mapping[int, float], clm: Mapping[int, float]) -> dict[str, Any]:
    """The share of the exact run's gain over CLM that a method keeps, over the seeds that have all three.

    `1 - mean(method - exact) / mean(clm - exact)`; the 95 % interval is Student's t of the paired differences and takes
    the gain as known. None where there is no seed, or no gain.
    """
    seeds = sorted(method.keys() & exact.keys() & clm.keys())
    lost = [method[seed] - exact[seed] for seed in seeds]
    gain = fmean(clm[seed] - exact[seed] for seed in seeds) if seeds else 0.0
    if gain <= 0:
        return {"seeds": seeds, "gain": gain, "mean": None, "low": None, "high": None}
    mean, width = 1 - fmean(lost) / gain, math.inf
    if len(seeds) > 1:
        width = T_975.get(len(seeds), 1.96) * stdev(lost) / math.sqrt(len(seeds)) / gain
    ends = (None, None) if math.isinf(width) else (mean - width, mean + width)
    return {"seeds": seeds, "gain": gain, "mean": mean, "low": ends[0], "high": ends[1]}


def step_ratios(benchmark: Path) -> dict[str, float]:
    """Step time over plain training's by method, from the benchmark's records; empty where it was not made."""
    if not benchmark.exists():
        return {}
    records = json.loads(benchmark.read_text())
    found = {record["name"]: record["step_ratio"] for record in records if record["keep"] == KEEP_RATIO}
    return {method: found[name] for method, name in BENCHMARK.items() if name in found}


class RowResults:
    """What the finished runs that compare backward passes say."""

    def __init__(self, results: Results, exact: str = f"slm-{KEEP_RATIO}") -> None:
        self.results, self.exact = results, exact

    def losses(self, name: str, measure: str) -> dict[int, float]:
        """By seed: the last held-out loss, of the whole target or of the inside of its problems."""
        if measure == "target":
            return self.results.final(name)
        return {seed: found["inside"][-1] for seed, found in self.results.inside[name].items()}

    def kept(self, method: str, measure: str) -> dict[str, Any]:
        """See `gain_kept`."""
        return gain_kept(*(self.losses(name, measure) for name in (method, self.exact, "clm")))

    def metric(self, name: str, metric: str) -> float | None:
        """Mean over seeds and logged steps of a metric."""
        curves = [run.metric(metric, "tokens").y for run in self.results.runs[name].values()]
        values = [value for curve in curves for value in curve]
        return fmean(values) if values else None


def write_rows(out: Path, results: Results, benchmark: Path, *, command: str = "study.py results --rows") -> Path:
    """Write rows.md, rows.json and rows.png into `out`/results.

    Args:
        command: what the page says that it was made by.

    Raises:
        SystemExit: nothing can be compared yet.
    """
    found = RowResults(results)
    methods = [name for name in METHODS if results.runs[name]]
    if not methods or not results.runs[found.exact] or not results.runs["clm"]:
        raise SystemExit("CLM, exact SLM and one run with other rows are not finished yet: run `train --rows` first")
    measures = [measure for measure in ("target", "inside") if found.losses(found.exact, measure)]
    numbers: dict[str, Any] = {
        name: {
            **{measure: found.kept(name, measure) for measure in measures},
            "clipped": found.metric(name, "clipped_share"),
            "share": found.metric(name, "backward_row_share"),
            "variance": found.metric(name, "backward_added_variance"),
        }
        for name in methods
    }
    numbers["exact"] = {"clipped": found.metric(found.exact, "clipped_share")}
    names = ("clm", found.exact, *methods)
    numbers["final"] = {name: {measure: found.losses(name, measure) for measure in measures} for name in names}
    numbers["clean"] = {name: results.final(name) for name in ("reference", CLEAN) if results.runs[name]}
    intro = f"Made by `python examples/study/{command}`. {_setting(next(iter(results.runs[found.exact].values())))}"
    return write_page(out / "results", numbers, step_ratios(benchmark), intro)


def write_page(folder: Path, numbers: Mapping[str, Any], ratios: Mapping[str, float], intro: str) -> Path:
    """Write rows.md, rows.json and rows.png into a folder, which is made.

    Args:
        numbers: what rows.json holds.
        ratios: step time over plain training's by method.
    """
    methods = [name for name in METHODS if name in numbers]
    measures = [measure for measure in ("target", "inside") if measure in numbers[methods[0]]]
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "rows.json", (json.dumps(numbers, indent=1) + "\n").encode())
    write_durably(folder / "rows.png", png([_panel(numbers, methods, measures[-1], ratios)]))
    lines = [_HEADING, intro.rstrip(), _EXPLANATION, *_page(numbers, methods, measures, ratios)]
    write_durably(folder / "rows.md", ("\n".join(lines) + "\n").encode())
    return folder / "rows.md"


def _panel(numbers: Mapping[str, Any], methods: Sequence[str], measure: str, ratios: Mapping[str, float]) -> Panel:
    """Quality against cost, or against the share of the rows where no step was timed."""
    lines = []
    for i, name in enumerate(["exact", *methods]):
        kept = {"mean": 1.0, "low": 1.0, "high": 1.0} if name == "exact" else numbers[name][measure]
        share = 1.0 if name == "exact" else numbers[name]["share"]
        x = ratios.get(name) if ratios else share
        if x is not None and kept["mean"] is not None:
            low, high = (kept["mean"] if kept[end] is None else kept[end] for end in ("low", "high"))
            # a band needs a width
            lines.append(Curve(name=name, x=[x - 0.002, x + 0.002], y=[kept["mean"]] * 2, low=[low] * 2,
                              high=[high] * 2, color=COLORS[i], marker=MARKERS[i]))  # fmt: skip
    label = "step time / plain training's" if ratios else "share of the rows"
    return Panel(title=f"Gain kept ({measure})", x_label=label, y_label="share of the exact run's gain", curves=lines)


_HEADING = "# The backward pass on some of the rows: results\n"
_EXPLANATION = (
    "Gain kept: the share of exact SLM's gain over CLM in the final held-out loss, with the 95 % interval of the "
    "paired differences. Hoped for: at least 0.90, its interval from 0.75 on. Times are not of these runs but of "
    "`python tools/benchmark.py backward`, a larger model's.\n"
)


def _setting(run: RunMetrics) -> str:
    """Size and length of a run, where its configuration says them all."""
    names = ("num_layers", "hidden_size", "train_iters", "global_batch_size", "seq_length")
    values = [run.config.get(name) for name in names]
    if None in values:
        return ""
    layers, width, steps, samples, length = values
    return f"{layers} layers, hidden size {width}, {steps} steps of {samples} x {length} tokens."


def _page(
    numbers: Mapping[str, Any], methods: Sequence[str], measures: Sequence[str], ratios: Mapping[str, float]
) -> Iterator[str]:
    head = ["run", *(f"gain kept, {measure}" for measure in measures), "seeds", "rows", "added variance", "clipped"]
    yield "| " + " | ".join([*head, "step / plain"]) + " |"
    yield "|" + "---|" * (len(head) + 1)
    for name in methods:
        row = numbers[name]
        cells = [_interval(row[measure]) for measure in measures]
        cells += [str(len(row[measures[0]]["seeds"])), *(_shown(row[key]) for key in ("share", "variance", "clipped"))]
        yield "| " + " | ".join([name, *cells, _shown(ratios.get(name))]) + " |"
    exact = ["", *[""] * (len(measures) - 1), "", "1.000", "0.000", _shown(numbers["exact"]["clipped"])]
    yield "| " + " | ".join(["exact", *exact, _shown(ratios.get("exact"))]) + " |"
    for measure in measures:
        values = {name: list(of[measure].values()) for name, of in numbers.get("final", {}).items()}
        means = [f"{name} {fmean(losses):.4f}" for name, losses in values.items() if losses]
        if means:
            yield f"\nFinal losses, {measure} (means, nats): {', '.join(means)}."
    for measure in measures:
        for name in methods:
            kept = numbers[name][measure]
            reached = kept["low"] is not None and kept["mean"] >= 0.90 and kept["low"] >= 0.75
            yield f"\n- {'Reached' if reached else '**Not reached**'} by {name} ({measure}): {_interval(kept)}."
    if len(numbers["clean"]) == 2:
        exactly, sampled = (numbers["clean"][name] for name in ("reference", CLEAN))
        both = sorted(exactly.keys() & sampled.keys())
        differences = ", ".join(f"{sampled[seed] - exactly[seed]:+.4f}" for seed in both)
        yield f"\nOn clean text, all tokens trained on: sampled minus exact, by seed: {differences} nats."
    yield "\n![Share of the gain that is kept, against the cost](rows.png)"


def _interval(kept: Mapping[str, Any]) -> str:
    if kept["mean"] is None:
        return "no gain to keep"
    return f"{kept['mean']:.2f}" + ("" if kept["low"] is None else f" [{kept['low']:.2f}, {kept['high']:.2f}]")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
