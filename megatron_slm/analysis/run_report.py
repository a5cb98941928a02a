"""HTML report that compares runs: what it comes to, summary, tokens to reach a loss, curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from megatron_slm.analysis import page, sampled_rows
from megatron_slm.analysis.charts import COLORS, MARKERS, Curve, Panel, png, svg
from megatron_slm.analysis.runs import AXIS_LABELS, Axis, RunMetrics, Series, held_out_sets
from megatron_slm.analysis.verdict import CAUTION, verdict
from megatron_slm.files import write_durably

_NATS = "nats per token"
_TRAINING_PANELS = (
    ("Training loss, all tokens", "loss_all", _NATS),
    ("Training loss, kept tokens", "loss", _NATS),
    ("Training loss, tokens not kept", "loss_unselected", _NATS),
    ("Excess loss of kept tokens", "excess_selected", _NATS),
    ("Share of kept tokens", "keep_fraction", "share of valid tokens"),
    ("Gradient norm before clipping", "grad_norm", "norm"),
    ("Share of clipped steps", "clipped_share", "share of steps"),
    ("Rows of the backward pass", "backward_row_share", "share of rows"),
    ("Variance added by row sampling", "backward_added_variance", "share of the squared norm"),
    ("The same, block with most", "backward_added_variance_max", "share of the squared norm"),
    ("Throughput", "tokens_per_second", "tokens per second"),
    ("Learning rate", "lr", "learning rate"),
)


def panels(runs: Sequence[RunMetrics], axis: Axis) -> list[Panel]:
    """Return a chart of every metric that any run has logged: held-out losses first, then training."""
    label = AXIS_LABELS[axis]
    made = [
        _panel(f"Held-out loss: {name}", label, _NATS, [(run, run.held_out(name, axis)) for run in runs])
        for name in held_out_sets(runs)
    ]
    for title, key, unit in _TRAINING_PANELS:
        made.append(_panel(title, label, unit, [(run, run.metric(key, axis)) for run in runs]))
    agreements = [(run, run.agreement(axis)) for run in runs]
    made.append(_panel("Selection unchanged since the last probe", label, "share of kept tokens", agreements))
    return [panel for panel in made if panel.curves]


def _panel(title: str, x_label: str, y_label: str, by_run: Sequence[tuple[RunMetrics, Series]]) -> Panel:
    curves = [
        Curve(
            name=run.name,
            x=series.x,
            y=series.y,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            style="-" if i < len(COLORS) else "--",
        )
        for i, (run, series) in enumerate(by_run)
        if series
    ]
    return Panel(title=title, x_label=x_label, y_label=y_label, curves=curves, hides_start=y_label == _NATS)


def tokens_to_reach(
    runs: Sequence[RunMetrics], targets: Mapping[str, Sequence[float]] | None = None
) -> list[dict[str, Any]]:
    """Return the millions of tokens that each run reads until its held-out loss first falls to a target.

    Targets are the last losses of the runs and those of `targets`, by held-out set. `ratio` is relative to the first
    run, the baseline. Both are None if a target is never reached.
    """
    rows = []
    for name in held_out_sets(runs):
        series = {run.name: run.held_out(name) for run in runs}
        wanted = [(f"last loss of {run}", losses.y[-1]) for run, losses in series.items() if losses]
        wanted += [("target", loss) for loss in (targets or {}).get(name, ())]
        for label, loss in sorted(wanted, key=lambda pair: -pair[1]):
            reached = {run: losses.reaches(loss) for run, losses in series.items()}
            baseline = reached[runs[0].name]
            ratios = {run: None if at is None or not baseline else at / baseline for run, at in reached.items()}
            rows.append({"set": name, "target": label, "loss": loss, "million_tokens": reached, "ratio": ratios})
    return rows


def summary(run: RunMetrics) -> dict[str, Any]:
    """Return the key figures of a run, losses in nats per token."""
    has_times = any(line.get("step_time_seconds") for line in run.training)
    rates = [line["tokens_per_second"] for line in run.training if line.get("tokens_per_second")]
    step = run.last_step
    is_selective = run.config.get("objective") == "slm"
    return {
        "name": run.name,
        "status": run.status,
        "objective": run.config.get("objective"),
        "score": _listed(run.config.get("slm_score")) if is_selective else None,
        "keep_ratio": run.config.get("slm_keep_ratio") if is_selective else None,
        "step": step,
        "million_tokens": _finite(run.position("tokens", step)),
        "million_trained_tokens": _finite(run.position("trained-tokens", step)) if run.training else None,
        "hours": _finite(run.position("hours", step)) if has_times else None,
        "median_tokens_per_second": median(rates) if rates else None,
        "held_out": {name: run.held_out(name).y[-1] for name in run.set_names},
        "skipped_steps": max((line.get("skipped_steps") or 0 for line in run.training), default=0),
        "unreadable_lines": run.unreadable_lines,
        **sampled_rows.backward_rows(run),
    }


def write_report(
    runs: Sequence[RunMetrics],
    output: Path,
    *,
    axis: Axis = "tokens",
    targets: Mapping[str, Sequence[float]] | None = None,
    extra: Sequence[Markup] = (),
) -> Path:
    """Write the report as HTML to `output`, and its charts beside it as PNG; both durably.

    Args:
        runs: runs to compare; the first is the baseline.
        targets: further losses to reach, by held-out set.
        extra: further parts, inserted before the curves.
    """
    charts = panels(runs, axis)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output.with_suffix(".png"), png(charts))
    names = page.listed([run.name for run in runs]) if len(runs) < 4 else f"{len(runs)} runs"
    parts = [
        *(page.paragraph(sentence, kind="verdict") for sentence in verdict(runs)),
        *([page.paragraph(CAUTION, kind="soft")] if len(runs) > 1 and held_out_sets(runs) else []),
        *_notes(runs),
        _summary_table(runs),
        *extra,
        *sampled_rows.comparison(runs),
        *_reach_table(runs, tokens_to_reach(runs, targets)),
        page.heading("Curves"),
        page.paragraph(
            "Training curves are running means over logged steps. Losses are in nats per token.", kind="soft"
        ),
        page.pictures((chart.describe(), svg(chart)) for chart in charts),
    ]
    return page.write_page(output, f"Training report: {names}", parts)


def _notes(runs: Sequence[RunMetrics]) -> Iterator[Markup]:
    for run in runs:
        if run.is_unfinished:
            yield page.paragraph(f"{run.name} is not finished: {run.status} so far.", kind="verdict")
        if run.unreadable_lines:
            yield page.paragraph(
                f"{run.name}: skipped {run.unreadable_lines} unreadable line(s) of its metrics.", kind="soft"
            )
        if run.training and not run.evaluations:
            yield page.paragraph(f"{run.name} has no held-out losses yet (--valid-data-path).", kind="soft")


def _summary_table(runs: Sequence[RunMetrics]) -> Markup:
    sets = held_out_sets(runs)
    heads = ["run", "objective", "progress"]
    heads += [*(f"{name}, nats" for name in sets), *(f"{name}, perplexity" for name in sets)]
    heads += ["tokens read", "trained on", "tokens/s", "hours"]
    rows = []
    for row in map(summary, runs):
        losses = [row["held_out"].get(name) for name in sets]
        keep = "" if row["keep_ratio"] is None else f" {row['keep_ratio']:g}"
        keep += "" if row["score"] in (None, ["excess"]) else f" {' + '.join(map(str, row['score']))}"
        cells = [row["name"], f"{row['objective'] or '?'}{keep}", row["status"]]
        cells += [_cell(loss, ".4f") for loss in losses]
        cells += [_cell(None if loss is None else math.exp(min(loss, 700.0)), ",.3f") for loss in losses]
        cells += [_tokens(row["million_tokens"]), _tokens(row["million_trained_tokens"])]
        cells += [_cell(row["median_tokens_per_second"], ",.0f"), _cell(row["hours"], ",.3f")]
        rows.append(cells)
    return page.table(heads, rows)


def _reach_table(runs: Sequence[RunMetrics], rows: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    if not rows or len(runs) < 2:
        return
    yield page.heading("Tokens to reach a loss")
    yield page.paragraph(
        f"Tokens read until the held-out loss first falls to a target, and their ratio to {runs[0].name}'s."
    )
    heads = ["held-out set", "loss", "target", *(run.name for run in runs)]
    body = []
    for row in rows:
        cells = [row["set"], f"{row['loss']:.4f}", row["target"]]
        for run in runs:
            at, ratio = row["million_tokens"][run.name], row["ratio"][run.name]
            share = "" if ratio is None else f" ({ratio:.2f}x)"
            cells.append("never" if at is None else f"{_tokens(at)}{share}")
        body.append(cells)
    yield page.table(heads, body)


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _tokens(millions: float | None) -> str:
    """Write a number of tokens in the unit that fits: 12,288, 3.40 M or 15.00 B."""
    if millions is None:
        return "–"
    if millions < 1:
        return f"{millions * 1e6:,.0f}"
    return f"{millions:,.2f} M" if millions < 1000 else f"{millions / 1000:,.2f} B"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _listed(value: Any) -> list[Any] | None:
    return value if value is None or isinstance(value, list) else [value]
