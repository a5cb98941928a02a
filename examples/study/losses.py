"""The part of the study that compares losses: distillation and weighted cross-entropy on kept tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_slm.files import write_durably
from megatron_slm.pages.charts import COLORS, MARKERS, Curve, Panel, png

if TYPE_CHECKING:
    from results import Results

METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "se-kd": (("--slm-keep-ratio", "0.2", "--slm-score", "entropy"), ("--loss", "kl")),
    "se-kd-alone": (
        ("--slm-keep-ratio", "0.2", "--slm-score", "entropy"),
        ("--loss", "kl", "--distillation-weight", "1.0"),
    ),
    "dft": (("--slm-keep-ratio", "0.6"), ("--slm-weight", "dft")),
}
"""Flags of the selection and of the loss. se-kd: the reference's distribution is distilled at the fifth of the tokens
where the model is least sure (SE-KD, arXiv 2602.01395), with half of the cross-entropy; se-kd-alone: without it.
dft: the tokens of slm-0.6, each weighted by its probability (DFT, arXiv 2508.05629)."""
COMPARED_WITH = ("clm", "slm-0.6")
MEASURES = ("target", "inside", "ends", "noisy")
"""Final losses on the held-out problems, inside of them, at their ends, and on noisy pages."""


def write_losses(out: Path, results: Results) -> Path:
    """Write losses.md, losses.json and losses.png into `out`/results: held-out losses, and distances in each seed.

    Raises:
        SystemExit: CLM is not finished.
    """
    if not results.runs["clm"]:
        raise SystemExit("CLM is not finished yet: run `train --losses` first")
    names = [name for name in (*COMPARED_WITH, *METHODS, "reference") if results.runs[name]]
    final = {name: {measure: _final(results, name, measure) for measure in MEASURES} for name in names}
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "losses.json", (json.dumps(final, indent=1) + "\n").encode())
    panels = [_panel(results, names, "Target: curated problems", "target")]
    panels.append(_panel(results, [name for name in names if name != "reference"], "Noisy pages, all tokens", "noisy"))
    write_durably(folder / "losses.png", png(panels))
    write_durably(folder / "losses.md", ("\n".join(_page(final)) + "\n").encode())
    return folder / "losses.md"


def _final(results: Results, name: str, measure: str) -> dict[int, float]:
    if measure not in ("inside", "ends"):
        return results.final(name, measure)
    return {seed: found[measure][-1] for seed, found in results.inside[name].items()}


def _panel(results: Results, names: Sequence[str], title: str, held_out: str) -> Panel:
    """The mean over seeds of a held-out loss over the tokens read, with a band from the lowest to the highest seed."""
    curves = []
    for i, name in enumerate(names):
        series = [run.held_out(held_out) for run in results.runs[name].values()]
        series = [one for one in series if one]
        if series:
            columns = list(zip(*(one.y for one in series), strict=True))
            lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
            curves.append(Curve(name=name, x=series[0].x, y=[fmean(column) for column in columns], low=lowest,
                                high=highest, color=COLORS[i], marker=MARKERS[i]))  # fmt: skip
    return Panel(title=title, x_label="tokens read (millions)", y_label="nats per token", curves=curves)


def _page(final: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Iterator[str]:
    from results import shown  # that module draws figures; this one is read for its flags

    yield "# Losses on kept tokens: results\n"
    yield (
        "Made by `python examples/study/study.py results --losses`. Final held-out losses in nats a token, as the mean "
        "over seeds ± its 95 % interval (Student's t); differences are of the same seed, with the lowest and the "
        "highest.\n"
    )
    yield "| run | seeds | target | less CLM's | less SLM's | inside problems | less CLM's | less SLM's | noisy pages |"
    yield "|" + "---|" * 9
    for name, measures in final.items():
        cells = [name, str(len(measures["target"]))]
        for measure in ("target", "inside"):
            values = measures[measure]
            cells.append(shown(list(values.values())) if values else "–")
            cells += [_difference(values, final.get(other, {}).get(measure, {})) for other in COMPARED_WITH]
        noisy = list(measures["noisy"].values())
        yield "| " + " | ".join([*cells, shown(noisy) if noisy else "–"]) + " |"
    yield "\n![Held-out losses over training](losses.png)"


def _difference(values: Mapping[int, float], others: Mapping[Any, float]) -> str:
    gaps = [loss - others[seed] for seed, loss in values.items() if seed in others]
    if not gaps or values is others:
        return "–"
    return f"{fmean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
