"""What the study's finished runs say: means over seeds with intervals, figures, and what did not come out."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slm.analysis.charts import COLOURS, MARKERS, Line, Panel, png
from megatron_slm.analysis.runs import RunMetrics, read_run
from megatron_slm.checkpoint.format import write_durably

if TYPE_CHECKING:
    from study import Planned

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for 95 % intervals, by the number of seeds."""
CLEAN = "arithmetic"
COLOUR = {"clm": COLOURS[0], "slm": COLOURS[1], "random": COLOURS[2], "reference": COLOURS[6]}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds, and the half-width of its 95 % interval (Student's t); None of one seed."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), T_975.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """A mean with its interval, in words."""
    mean, width = mean_and_interval(values)
    return f"{mean:{form}}" if width is None else f"{mean:{form}} ± {width:{form}}"


class Results:
    """The finished runs, by name and seed."""

    def __init__(self, runs: Sequence[Planned]) -> None:
        self.runs: dict[str, dict[int, RunMetrics]] = defaultdict(dict)
        self.looked: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.answers: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.dynamics: dict[int, dict[str, Any]] = {}
        for run in runs:
            if not (run.folder / "finished").exists():
                continue
            self.runs[run.name][run.seed] = read_run(run.folder)
            for file, table in (("selection", self.looked), ("answers", self.answers)):
                if (path := run.folder / f"{file}.json").exists():
                    table[run.name][run.seed] = json.loads(path.read_text())
            if run.name == "clm" and (path := run.folder / "dynamics.json").exists():
                self.dynamics[run.seed] = json.loads(path.read_text())

    def final(self, name: str, held_out: str = "target") -> dict[int, float]:
        """By seed: the last held-out loss."""
        curves = {seed: run.held_out(held_out) for seed, run in self.runs[name].items()}
        return {seed: curve.y[-1] for seed, curve in curves.items() if curve}

    def tokens_ratio(self, name: str) -> dict[int, float]:
        """By seed: tokens until CLM's last target loss is reached, as a share of CLM's; infinite where it never is."""
        goals = self.final("clm")
        out = {}
        for seed, run in self.runs[name].items():
            if seed in goals:
                reached = run.held_out("target").reaches(goals[seed])
                out[seed] = math.inf if reached is None else reached / run.held_out("target").x[-1]
        return out

    def kept(self, name: str) -> tuple[list[float], list[float], list[float]]:
        """Over seeds: precision and recall of the kept tokens against the clean ones, and the clean share of all."""
        precision, recall, base = [], [], []
        for looked in self.looked[name].values():
            groups = [group for group in looked["groups"] if group["grouping"] == "part of the document"]
            clean = next(group for group in groups if group["name"] == CLEAN)
            precision.append(clean["tokens"] * clean["kept_share"] / looked["kept_tokens"])
            recall.append(clean["kept_share"])
            base.append(clean["tokens"] / sum(group["tokens"] for group in groups))
        return precision, recall, base

    def kind_losses(self, name: str) -> dict[str, list[float]]:
        """Over seeds: the last model's mean loss on clean and on all other tokens of held-out noisy pages."""
        out: dict[str, list[float]] = {"clean": [], "other": []}
        for looked in self.looked[name].values():
            groups = [group for group in looked["groups"] if group["grouping"] == "part of the document"]
            for kind in out:
                own = [group for group in groups if (group["name"] == CLEAN) == (kind == "clean")]
                total = sum(group["tokens"] for group in own)
                out[kind].append(sum(group["mean_loss"] * group["tokens"] for group in own) / total)
        return out

    def ratios(self) -> list[float]:
        """Keep ratios with a finished SLM run."""
        found = (re.fullmatch(r"slm-([\d.]+)", name) for name in self.runs)
        return sorted(float(match[1]) for match in found if match)

    def best_ratio(self) -> float | None:
        """The keep ratio with the lowest mean target loss among those with the most seeds."""
        most = max((len(self.runs[f"slm-{ratio}"]) for ratio in self.ratios()), default=0)
        eligible = [ratio for ratio in self.ratios() if len(self.runs[f"slm-{ratio}"]) == most]
        return min(eligible, key=lambda ratio: fmean(self.final(f"slm-{ratio}").values()), default=None)


# ---- figures ------------------------------------------------------------------------------------------------


def curve_over_seeds(runs: Mapping[int, RunMetrics], held_out: str, name: str, colour: str, marker: str) -> Line | None:
    """The mean over seeds, with a band from the lowest to the highest seed."""
    curves = [curve for run in runs.values() if (curve := run.held_out(held_out))]
    if not curves:
        return None
    values = np.array([curve.y for curve in curves if len(curve.y) == len(curves[0].y)])
    return Line(name=name, x=curves[0].x, y=values.mean(axis=0).tolist(), low=values.min(axis=0).tolist(),
                high=values.max(axis=0).tolist(), colour=colour, marker=marker)  # fmt: skip


def figures(results: Results) -> Iterator[Panel]:
    """The paper's figures 1, 6, 9 and 3, as far as there are runs."""
    compared = ["clm", f"slm-{results.best_ratio()}", f"random-{results.best_ratio()}", "reference"]
    for title, held_out in (("Target loss (fig. 1)", "target"), ("Loss on noisy pages", "noisy")):
        lines = [
            curve_over_seeds(results.runs[name], held_out, name, COLOUR[name.split("-")[0]], MARKERS[i])
            for i, name in enumerate(compared)
        ]
        yield Panel(title=title, x_label="tokens read (millions)", y_label="nats per token", hides_start=True,
                    lines=[line for line in lines if line is not None])  # fmt: skip
    yield _ablation(results)
    yield from _class_dynamics(results)


def _ablation(results: Results) -> Panel:
    lines = []
    for i, kind in enumerate(("slm", "random")):
        found = {r: results.final(f"{kind}-{r}") for r in results.ratios() if results.runs[f"{kind}-{r}"]}
        columns = [list(seeds.values()) for seeds in found.values()]
        if columns:
            lines.append(
                Line(
                    name=kind,
                    x=list(found),
                    y=[fmean(c) for c in columns],
                    low=[min(c) for c in columns],
                    high=[max(c) for c in columns],
                    colour=COLOUR[kind],
                    marker=MARKERS[i + 1],
                )
            )
    clm = list(results.final("clm").values())
    if clm and results.ratios():
        ends = [results.ratios()[0], 1.0]
        lines.append(Line(name="clm", x=ends, y=[fmean(clm)] * 2, colour=COLOUR["clm"], style="--"))
    return Panel(title="Final target loss by keep ratio (fig. 9)", x_label="keep ratio", y_label="nats per token",
                 lines=lines)  # fmt: skip


def _class_dynamics(results: Results) -> Iterator[Panel]:
    if not results.dynamics:
        return
    first = next(iter(results.dynamics.values()))
    lines = []
    for i, name in enumerate(first["class_mean_loss"]):
        rows = [d["class_mean_loss"][name] for d in results.dynamics.values() if None not in d["class_mean_loss"][name]]
        if rows:
            lines.append(Line(name=name, x=first["steps"], y=np.mean(rows, axis=0).tolist(), colour=COLOURS[i],
                              marker=MARKERS[i]))  # fmt: skip
    yield Panel(title="CLM: mean loss of each class (fig. 3)", x_label="step", y_label="nats per token", lines=lines)


# ---- the page -----------------------------------------------------------------------------------------------


def write_results(out: Path, runs: Sequence[Planned]) -> Path:
    """Write `out`/results/README.md, figures.png and results.json.

    Raises:
        SystemExit: nothing can be compared yet.
    """
    results = Results(runs)
    if not results.runs["clm"] or not results.ratios():
        raise SystemExit("the study's CLM run and one SLM run are not finished yet: run `train` first")
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "figures.png", png(list(figures(results))))
    numbers = {
        name: {"seeds": sorted(seeds), "target_loss": results.final(name), "noisy_loss": results.final(name, "noisy"),
               "tokens_to_clm": results.tokens_ratio(name), "kinds": results.kind_losses(name)}
        for name, seeds in results.runs.items() if seeds
    }  # fmt: skip
    write_durably(folder / "results.json", (json.dumps(numbers, indent=1) + "\n").encode())
    missing = len(runs) - sum(map(len, results.runs.values()))
    write_durably(folder / "README.md", "\n".join(_page(results, missing)).encode())
    return folder / "README.md"


def _page(results: Results, missing: int) -> Iterator[str]:
    seeds = sorted(results.runs["clm"])
    step = next(iter(results.runs["clm"].values()))
    yield "# The study: results\n"
    yield (
        f"Made by `bash examples/study/run.sh`. {sum(map(len, results.runs.values()))} runs of "
        f"{step.position('tokens', step.last_step):.2f} million tokens each, {len(seeds)} seed(s); means over seeds, ± "
        "the 95 % interval of the mean (Student's t) where there are several. Losses in nats a token.\n"
    )
    if missing:
        yield f"**{missing} planned runs are not finished and not in this page**; the command goes on with them.\n"
    yield "![Target loss, noisy loss, keep ratios and classes of tokens](figures.png)\n"
    yield "## Held-out losses\n"
    yield "| run | seeds | target | noisy pages, clean tokens | noisy pages, other tokens | tokens to CLM's target |"
    yield "|---|---|---|---|---|---|"
    for name, own in sorted(
        results.runs.items(), key=lambda item: fmean(results.final(item[0]).values() or [math.inf])
    ):
        if own:
            yield _row(results, name, len(own))
    yield "\n## Which tokens are kept\n"
    yield "Precision and recall against the tokens that are known to be clean arithmetic, by the finished model.\n"
    yield "| run | precision | recall | clean share of all tokens |"
    yield "|---|---|---|---|"
    for name in sorted(results.looked):
        if results.looked[name] and name.startswith(("slm", "self", "reference-loss", "random")):
            columns = results.kept(name)
            yield f"| {name} | {' | '.join(shown([100 * v for v in column], '.1f') + ' %' for column in columns)} |"
    if results.answers:
        yield "\n## Exact answers to held-out problems\n"
        yield "| run | right answers |\n|---|---|"
        for name, own in results.answers.items():
            values = [100 * row["tasks"]["arithmetic"]["accuracy"] for row in own.values()]
            yield f"| {name} | {shown(values, '.1f')} % |"
    yield "\n## Against what was hoped for\n"
    yield from (f"- {line}" for line in verdicts(results))
    yield ""


def _row(results: Results, name: str, seeds: int) -> str:
    kinds = results.kind_losses(name)
    losses = [shown(kinds[kind]) if kinds[kind] else "–" for kind in ("clean", "other")]
    ratios = list(results.tokens_ratio(name).values())
    never = sum(map(math.isinf, ratios))
    share = f"never in {never} of {len(ratios)}" if never else shown(ratios, ".2f") + "x"
    return f"| {name} | {seeds} | {shown(list(results.final(name).values()))} | {losses[0]} | {losses[1]} | {share} |"


def verdicts(results: Results) -> Iterator[str]:
    """The three figures that the method should reach, and whether it does."""
    best = results.best_ratio()
    ratios = list(results.tokens_ratio(f"slm-{best}").values())
    ok = bool(ratios) and fmean(ratios) <= 0.6
    reached = (
        "never reaches" if any(map(math.isinf, ratios)) else f"takes {shown(ratios, '.2f')} of the tokens to reach"
    )
    state = "Reached" if ok else "**Not reached**"
    yield (
        f"{state}: SLM at its best keep ratio ({best}) {reached} CLM's final target loss (hoped for: at most 0.6 of "
        "them)."
    )
    compared = [r for r in results.ratios() if results.runs[f"random-{r}"]]
    losing = []
    for ratio in compared:
        slm, random = results.final(f"slm-{ratio}"), results.final(f"random-{ratio}")
        both = slm.keys() & random.keys()
        if both and fmean(slm[s] for s in both) >= fmean(random[s] for s in both):
            losing.append(ratio)
    words = f"not at {', '.join(map(str, losing))}" if losing else "at every one"
    state = "**Not reached**" if losing else "Reached"
    yield f"{state}: SLM beats random tokens at the {len(compared)} keep ratios that were run: {words}."
    gains = {}
    for ratio in results.ratios():
        precision, _, base = results.kept(f"slm-{ratio}")
        if precision:
            gains[ratio] = 100 * (fmean(precision) - fmean(base))
    if gains:
        gain = gains.get(best, max(gains.values())) if best is not None else max(gains.values())
        state = "Reached" if gain >= 15 else "**Not reached**"
        each = ", ".join(f"{ratio}: {value:+.1f}" for ratio, value in gains.items())
        yield f"{state}: precision above the base rate by {gain:+.1f} points at the best ratio (hoped for: 15; {each})."
