"""Results of the study's finished runs: means over seeds with intervals, figures, and which goals were reached."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slm.analysis.runs import RunMetrics, Series, read_run
from megatron_slm.files import write_durably
from megatron_slm.pages.charts import COLORS, MARKERS, Curve, Panel, png

CLEAN = "arithmetic"
"""Kind of the tokens worth learning."""

if TYPE_CHECKING:
    from study import Planned

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for 95 % intervals, by the number of seeds."""
PAPER_SHARES = {"H->H": 0.11, "L->H": 0.12, "H->L": 0.26, "L->L": 0.51}
"""Shares of the classes for TinyLlama on OpenWebMath (arXiv 2404.07965, figure 3)."""
COLOR = {"clm": COLORS[0], "slm": COLORS[1], "random": COLORS[2], "reference": COLORS[6]}
MARKER = {"clm": MARKERS[0], "slm": MARKERS[1], "random": MARKERS[2], "reference": MARKERS[3]}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over seeds and the half-width of its 95 % interval (Student's t), None for one seed."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), T_975.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """Format a mean with its interval."""
    mean, width = mean_and_interval(values)
    return f"{mean:{form}}" if width is None else f"{mean:{form}} ± {width:{form}}"


class Results:
    """Finished runs, by name and seed."""

    def __init__(self, runs: Sequence[Planned]) -> None:
        self.runs: dict[str, dict[int, RunMetrics]] = defaultdict(dict)
        self.selections: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.answers: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.followed: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.inside: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.dynamics: dict[int, dict[str, Any]] = {}
        self.base: dict[int, RunMetrics] = {}
        """Base models that the other runs of a seed start from."""
        for run in runs:
            if not run.is_finished:
                continue
            if run.name == "base":
                self.base[run.seed] = read_run(run.folder)
                continue
            self.runs[run.name][run.seed] = read_run(run.folder)
            for file, table in (
                ("selection", self.selections),
                ("answers", self.answers),
                ("followed", self.followed),
                ("inside", self.inside),
            ):
                if (path := run.folder / f"{file}.json").exists():
                    table[run.name][run.seed] = json.loads(path.read_text())
            if run.name == "clm" and (path := run.folder / "dynamics.json").exists():
                self.dynamics[run.seed] = json.loads(path.read_text())

    def final(self, name: str, held_out: str = "target") -> dict[int, float]:
        """Return the last held-out loss by seed."""
        losses = {seed: run.held_out(held_out) for seed, run in self.runs[name].items()}
        return {seed: series.y[-1] for seed, series in losses.items() if series}

    def tokens_ratio(self, name: str) -> dict[int, float]:
        """Return the tokens to reach CLM's last target loss as a share of CLM's, by seed; infinite if never reached."""
        goals = self.final("clm")
        out = {}
        for seed, run in self.runs[name].items():
            if seed in goals:
                reached = run.held_out("target").reaches(goals[seed])
                out[seed] = math.inf if reached is None else reached / run.held_out("target").x[-1]
        return out

    def inside_ratio(self, name: str) -> dict[int, float]:
        """Return `tokens_ratio` for the loss inside problems; skips runs with other checkpoints than CLM's."""
        out = {}
        for seed, found in self.inside[name].items():
            clm = self.inside["clm"].get(seed)
            if clm is not None and clm["steps"] == found["steps"]:
                reached = Series(tuple(found["steps"]), tuple(found["inside"])).reaches(clm["inside"][-1])
                out[seed] = math.inf if reached is None else reached / clm["steps"][-1]
        return out

    def kept(self, name: str) -> tuple[list[float], list[float], list[float]]:
        """Return precision and recall of the kept tokens against the clean ones, and the clean share, over seeds."""
        precision, recall, base = [], [], []
        for selections in self.selections[name].values():
            groups = [group for group in selections["groups"] if group["grouping"] == "part of the document"]
            clean = next(group for group in groups if group["name"] == CLEAN)
            precision.append(clean["tokens"] * clean["kept_share"] / selections["kept_tokens"])
            recall.append(clean["kept_share"])
            base.append(clean["tokens"] / sum(group["tokens"] for group in groups))
        return precision, recall, base

    def kind_losses(self, name: str) -> dict[str, list[float]]:
        """Return the last model's mean loss on clean and on other tokens of held-out noisy pages, over seeds."""
        out: dict[str, list[float]] = {"clean": [], "other": []}
        for selections in self.selections[name].values():
            groups = [group for group in selections["groups"] if group["grouping"] == "part of the document"]
            for kind in out:
                own = [group for group in groups if (group["name"] == CLEAN) == (kind == "clean")]
                total = sum(group["tokens"] for group in own)
                out[kind].append(sum(group["mean_loss"] * group["tokens"] for group in own) / total)
        return out

    def ratios(self) -> list[float]:
        """Return the keep ratios with a finished SLM run."""
        found = (re.fullmatch(r"slm-([\d.]+)", name) for name in self.runs)
        return sorted(float(match[1]) for match in found if match)

    def best_ratio(self) -> float | None:
        """Return the keep ratio with the lowest mean target loss among those with the most seeds."""
        most = max((len(self.runs[f"slm-{ratio}"]) for ratio in self.ratios()), default=0)
        eligible = [ratio for ratio in self.ratios() if len(self.runs[f"slm-{ratio}"]) == most]
        return min(eligible, key=lambda ratio: fmean(self.final(f"slm-{ratio}").values()), default=None)


# ---- figures ------------------------------------------------------------------------------------------------


def band(name: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> Curve:
    """Return the mean over seeds as a curve, with a band from the lowest to the highest seed."""
    values, kind = np.array(rows), name.split("-")[0]
    return Curve(name=name, x=x, y=values.mean(axis=0).tolist(), low=values.min(axis=0).tolist(),
                high=values.max(axis=0).tolist(), color=COLOR[kind], marker=MARKER[kind])  # fmt: skip


def held_out_panel(results: Results, title: str, held_out: str) -> Panel:
    """Draw a held-out loss over the tokens read, from the base model on."""
    curves = []
    for name in ("clm", f"slm-{results.best_ratio()}", f"random-{results.best_ratio()}", "reference"):
        losses = {seed: run.held_out(held_out) for seed, run in results.runs[name].items() if seed in results.base}
        losses = {seed: series for seed, series in losses.items() if series}
        if losses:
            start = {seed: results.base[seed].held_out(held_out).y[-1] for seed in losses}
            x = [0.0, *next(iter(losses.values())).x]
            curves.append(band(name, x, [[start[seed], *series.y] for seed, series in losses.items()]))
    return Panel(title=title, x_label="tokens read (millions)", y_label="nats per token", curves=curves)


def followed_panel(
    results: Results, title: str, key: str, table: Mapping[str, Mapping[int, dict[str, Any]]], names: Iterable[str]
) -> Panel:
    """Draw a quantity over the checkpoints of some runs."""
    curves = []
    for name in names:
        rows = list(table.get(name, {}).values())
        if not rows:
            continue
        any_run = next(iter(results.runs[name].values()))
        x = [any_run.position("tokens", step) for step in rows[0]["steps"]]
        curves.append(band(name, x, [row[key] for row in rows]))
    return Panel(title=title, x_label="tokens read (millions)", y_label="nats per token", curves=curves)


def by_ratio(
    results: Results,
    *,
    title: str,
    label: str,
    values: Callable[[str], Iterable[float]],
    flat: tuple[str, float] | None,
) -> Panel:
    """Draw a quantity of the SLM and random runs over the keep ratio.

    Args:
        values: returns a run's values over seeds, by its name.
        flat: name and value of a horizontal line.
    """
    curves = []
    for kind in ("slm", "random"):
        found = {r: list(values(f"{kind}-{r}")) for r in results.ratios() if results.runs[f"{kind}-{r}"]}
        found = {ratio: column for ratio, column in found.items() if column}
        if found:
            curves.append(
                Curve(
                    name=kind,
                    x=list(found),
                    y=[fmean(column) for column in found.values()],
                    low=[min(column) for column in found.values()],
                    high=[max(column) for column in found.values()],
                    color=COLOR[kind],
                    marker=MARKER[kind],
                )
            )
    if flat is not None and results.ratios():
        name, value = flat
        curves.append(Curve(name=name, x=[results.ratios()[0], 1.0], y=[value] * 2, color=COLOR["clm"], style="--"))
    return Panel(title=title, x_label="keep ratio", y_label=label, curves=curves)


def class_panel(results: Results) -> Panel:
    """Draw the mean loss of each class of tokens over CLM runs."""
    curves, first = [], next(iter(results.dynamics.values()))
    for i, name in enumerate(first["class_mean_loss"]):
        rows = [d["class_mean_loss"][name] for d in results.dynamics.values() if None not in d["class_mean_loss"][name]]
        if rows:
            curves.append(Curve(name=name.replace("->", "→"), x=first["steps"], y=np.mean(rows, axis=0).tolist(),
                              color=COLORS[i], marker=MARKERS[i]))  # fmt: skip
    return Panel(title="CLM: mean loss of each class", x_label="steps", y_label="nats per token", curves=curves)


def figures(results: Results) -> Iterator[tuple[str, str, list[Panel]]]:
    """Yield the file, caption and panels of each figure with finished runs."""
    yield (
        "target.png",
        "Held-out losses over training: curated problems (the paper's figure 1), and noisy pages",
        [held_out_panel(results, "Target: curated problems", "target"),
         held_out_panel(results, "Noisy pages, all tokens", "noisy")],
    )  # fmt: skip
    if results.inside["clm"]:
        compared = ["clm", f"slm-{results.best_ratio()}", f"random-{results.best_ratio()}"]
        yield (
            "inside.png",
            "The target loss inside problems, and at their ends (the end token and the one after it)",
            [followed_panel(results, "Target: inside problems", "inside", results.inside, compared),
             followed_panel(results, "Target: at the ends of problems", "ends", results.inside, compared)],
        )  # fmt: skip
    if results.followed:
        yield (
            "kept.png",
            "Losses on noisy pages of the tokens kept at the start, and of the others (the paper's figure 6)",
            [followed_panel(results, "Noisy pages: kept tokens", "kept", results.followed, results.followed),
             followed_panel(results, "Noisy pages: other tokens", "other", results.followed, results.followed)],
        )  # fmt: skip
    clm = list(results.final("clm").values())
    panels = [
        by_ratio(
            results,
            title="Final target loss",
            label="nats per token",
            values=lambda name: results.final(name).values(),
            flat=("clm", fmean(clm)) if clm else None,
        )
    ]
    _, _, base = results.kept(f"slm-{results.best_ratio()}")
    if base:
        panels.append(
            by_ratio(
                results,
                title="Clean share of the kept tokens",
                label="precision",
                values=lambda name: results.kept(name)[0],
                flat=("all tokens", fmean(base)),
            )
        )
    yield "keep-ratio.png", "Target loss over the keep ratio (the paper's figure 9), and precision", panels
    if results.dynamics:
        yield "classes.png", "Classes of tokens over the CLM runs (the paper's figure 3)", [class_panel(results)]


# ---- the page -----------------------------------------------------------------------------------------------


def write_results(out: Path, runs: Sequence[Planned]) -> Path:
    """Write README.md, results.json and the figures to `out`/results.

    Raises:
        SystemExit: no two runs can be compared yet.
    """
    results = Results(runs)
    if not results.runs["clm"] or not results.ratios():
        raise SystemExit("error: the CLM run or every SLM run is not finished yet. Fix: run `study.py train` first")
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = list(figures(results))
    for name, _, panels in pictures:
        write_durably(folder / name, png(panels))
    numbers = {
        name: {"seeds": sorted(seeds), "target_loss": results.final(name), "noisy_loss": results.final(name, "noisy"),
               "tokens_to_clm": results.tokens_ratio(name), "kinds": results.kind_losses(name),
               "precision_recall_base": results.kept(name),
               "tokens_to_clm_inside": results.inside_ratio(name),
               "inside": {s: found["inside"][-1] for s, found in results.inside[name].items()},
               "accuracy": {s: a["tasks"]["arithmetic"]["accuracy"] for s, a in results.answers[name].items()}}
        for name, seeds in list(results.runs.items()) if seeds
    }  # fmt: skip
    write_durably(folder / "results.json", (json.dumps(numbers, indent=1) + "\n").encode())
    missing = len(runs) - sum(map(len, results.runs.values())) - len(results.base)
    lines = _page(results, missing, [(name, words) for name, words, _ in pictures])
    write_durably(folder / "README.md", "\n".join(lines).encode())
    return folder / "README.md"


def _page(results: Results, missing: int, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    seeds = sorted(results.runs["clm"])
    clm = next(iter(results.runs["clm"].values()))
    yield "# The study: results\n"
    yield (
        f"Made by `bash examples/study/run.sh`. {sum(map(len, results.runs.values()))} runs of "
        f"{clm.position('tokens', clm.last_step):.2f} million tokens each (the reference: fewer), {len(seeds)} "
        "seed(s). Means over seeds, ± their 95 % interval (Student's t) for several seeds. Losses in nats per token. "
        "Bands in the figures range from the lowest to the highest seed.\n"
    )
    if missing:
        yield f"**{missing} planned runs are not finished and are missing here**; the same command resumes them.\n"
    yield "## Results against the goals\n"
    yield from (f"- {line}" for line in verdicts(results))
    for name, words in pictures:
        yield f"\n![{words}]({name})\n\n{words}."
    yield "\n## Held-out losses\n"
    yield (
        "| run | seeds | target | target, inside problems | noisy pages, clean tokens | noisy pages, other tokens "
        "| tokens to CLM's target | tokens to CLM's target, inside problems |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, own in sorted(
        results.runs.items(), key=lambda item: fmean(results.final(item[0]).values() or [math.inf])
    ):
        if own:
            yield _row(results, name, len(own))
    yield "\n## Kept tokens\n"
    yield "Precision and recall of the finished model's selection against the known clean arithmetic tokens.\n"
    yield "| run | precision | recall | clean share of all tokens |"
    yield "|---|---|---|---|"
    for name in sorted(results.selections):
        if results.selections[name] and name.startswith(("slm", "self", "reference-loss", "random")):
            columns = results.kept(name)
            yield f"| {name} | {' | '.join(shown([100 * v for v in column], '.1f') + ' %' for column in columns)} |"
    if results.dynamics:
        yield "\n## Classes of tokens in CLM\n"
        yield "| class | share | in the paper (TinyLlama) |\n|---|---|---|"
        for name, share in PAPER_SHARES.items():
            own = [100 * found["shares"][name] for found in results.dynamics.values()]
            yield f"| {name.replace('->', '→')} | {shown(own, '.1f')} % | {share:.0%} |"
    answered = {name: own for name, own in results.answers.items() if own}
    if answered:
        yield "\n## Exact answers to held-out problems\n"
        yield "| run | correct answers |\n|---|---|"
        for name, own in answered.items():
            values = [100 * row["tasks"]["arithmetic"]["accuracy"] for row in own.values()]
            yield f"| {name} | {shown(values, '.1f')} % |"
    yield ""


def _row(results: Results, name: str, seeds: int) -> str:
    kinds = results.kind_losses(name)
    losses = [shown(kinds[kind]) if kinds[kind] else "–" for kind in ("clean", "other")]
    inside = [found["inside"][-1] for found in results.inside[name].values()]
    shares = [_share(table) for table in (results.tokens_ratio(name), results.inside_ratio(name))]
    return (
        f"| {name} | {seeds} | {shown(list(results.final(name).values()))} | {shown(inside) if inside else '–'} | "
        f"{losses[0]} | {losses[1]} | {shares[0]} | {shares[1]} |"
    )


def _share(ratios: Mapping[int, float]) -> str:
    """Format the share of CLM's tokens that a run needs, over seeds."""
    values = list(ratios.values())
    if not values:
        return "–"
    never = sum(map(math.isinf, values))
    return f"never in {never} of {len(values)}" if never else shown(values, ".2f") + "x"


def verdicts(results: Results) -> Iterator[str]:
    """Yield the goals of the study and whether they are reached."""
    best = results.best_ratio()
    for goal, table in (
        ("final target loss", results.tokens_ratio(f"slm-{best}")),
        ("final loss inside the problems of the target", results.inside_ratio(f"slm-{best}")),
    ):
        ratios = list(table.values())
        if not ratios:
            continue
        state = "Reached" if fmean(ratios) <= 0.6 else "**Not reached**"
        reached = (
            "never reaches" if any(map(math.isinf, ratios)) else f"takes {shown(ratios, '.2f')} of the tokens to reach"
        )
        yield f"{state}: SLM at its best keep ratio ({best}) {reached} CLM's {goal} (goal: at most 0.6 of them)."
    compared = [r for r in results.ratios() if results.runs[f"random-{r}"]]
    losing = []
    for ratio in compared:
        slm, random = results.final(f"slm-{ratio}"), results.final(f"random-{ratio}")
        both = slm.keys() & random.keys()
        if both and fmean(slm[s] for s in both) >= fmean(random[s] for s in both):
            losing.append(ratio)
    state, exceptions = "Reached", ""
    if losing:
        state, exceptions = "**Not reached**", f" (not at {', '.join(map(str, losing))})"
    yield f"{state}: SLM beats random tokens at all {len(compared)} keep ratios compared{exceptions}."
    gains = {}
    for ratio in results.ratios():
        precision, _, base = results.kept(f"slm-{ratio}")
        if precision:
            gains[ratio] = 100 * (fmean(precision) - fmean(base))
    if gains:
        gain = gains.get(best, max(gains.values())) if best is not None else max(gains.values())
        state = "Reached" if gain >= 15 else "**Not reached**"
        each = ", ".join(f"{ratio}: {value:+.1f}" for ratio, value in gains.items())
        yield f"{state}: precision exceeds the base rate by {gain:+.1f} points at the best ratio (goal: 15; {each})."
