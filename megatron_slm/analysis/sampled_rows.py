"""Comparison of runs with an exact backward pass and runs with one on some of the rows (docs/row-sampling.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from megatron_slm.analysis import page
from megatron_slm.analysis.runs import RunMetrics, held_out_sets

_METRICS = ("backward_row_share", "backward_added_variance", "backward_added_variance_max", "clipped_share")


def backward_rows(run: RunMetrics) -> dict[str, Any]:
    """Return a run's kind of backward pass, and the means of its metrics over the logged steps; None where unknown."""
    return {"backward_rows": run.config.get("backward_rows") or "exact", **{key: _mean(run, key) for key in _METRICS}}


def comparison(runs: Sequence[RunMetrics]) -> Iterator[Markup]:
    """Yield the section on rows, if a run's backward pass leaves some out."""
    found = [backward_rows(run) for run in runs]
    if all(row["backward_rows"] == "exact" for row in found):
        return
    exact_runs = [run for run, row in zip(runs, found, strict=True) if row["backward_rows"] == "exact"]
    yield page.heading("Exact and sampled backward pass")
    yield page.paragraph(
        "In parentheses: speed and losses compared with the exact run of the same objective. The added variance is "
        "relative to the squared norm of the gradient; 0.02 is recommended (docs/row-sampling.md)."
    )
    sets = held_out_sets(runs)
    heads = ["run", "backward pass", "rows", "added variance", "most in a block", "clipped steps", "tokens/s"]
    heads += [f"{name}, nats" for name in sets]
    rows = []
    for run, row in zip(runs, found, strict=True):
        is_exact = row["backward_rows"] == "exact"
        share = 1.0 if is_exact else row["backward_row_share"]
        exact = None if is_exact else _twin(run, exact_runs)
        cells = [run.name, row["backward_rows"], _percent(share)]
        cells += [_number(row["backward_added_variance"]), _number(row["backward_added_variance_max"])]
        cells += [_percent(row["clipped_share"]), _speed(run, exact)]
        rows.append([*cells, *(_loss(run, exact, name) for name in sets)])
    yield page.table(heads, rows)


def _twin(run: RunMetrics, exact_runs: Sequence[RunMetrics]) -> RunMetrics | None:
    """Return the first exact run with a run's objective and keep ratio, else None."""
    keys = ("objective", "slm_keep_ratio") if run.config.get("objective") == "slm" else ("objective",)
    same = (one for one in exact_runs if all(one.config.get(key) == run.config.get(key) for key in keys))
    return next(same, None)


def _mean(run: RunMetrics, key: str) -> float | None:
    values = run.metric(key, "steps", smooth=False).y
    return fmean(values) if values else None


def _speed(run: RunMetrics, exact: RunMetrics | None) -> str:
    own = _tokens_per_second(run)
    if own is None:
        return "–"
    base = None if exact is None else _tokens_per_second(exact)
    return f"{own:,.0f}" + (f" ({own / base:.2f}x)" if base else "")


def _tokens_per_second(run: RunMetrics) -> float | None:
    rates = run.metric("tokens_per_second", "steps", smooth=False).y
    return median(rates) if rates else None


def _loss(run: RunMetrics, exact: RunMetrics | None, name: str) -> str:
    own = run.held_out(name).y[-1:]
    base = () if exact is None else exact.held_out(name).y[-1:]
    if not own:
        return "–"
    return f"{own[0]:.4f}" + (f" ({own[0] - base[0]:+.4f})" if base else "")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
