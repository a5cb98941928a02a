"""Conclusions from a comparison of runs, in sentences for readers who train no models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatron_slm.analysis.runs import RunMetrics

EQUAL_NATS = 0.002
"""Difference of two losses below which they are called equal."""
CAUTION = "These are single runs: repeat them with other seeds before you rely on a small difference."


def verdict(runs: Sequence[RunMetrics]) -> Iterator[str]:
    """Yield one sentence about each run: alone, or compared with the first one on every held-out set of both."""
    baseline, *others = runs
    if not others:
        yield _alone(baseline)
    for run in others:
        yield _compared(run, baseline)


def _alone(run: RunMetrics) -> str:
    read, trained = run.position("tokens", run.last_step), run.position("trained-tokens", run.last_step)
    text = f"{run.name} has read {_millions(read)} tokens" if math.isfinite(read) else f"{run.name} has begun"
    if math.isfinite(trained) and read and trained < 0.995 * read:
        text += f" and trained on {trained / read:.0%} of them"
    for name in run.set_names[:1]:
        losses = run.held_out(name)
        text += f"; its loss on held-out {name} text "
        if len(losses.y) > 1:
            text += f"went from {losses.y[0]:.3f} to {losses.y[-1]:.3f}"
        else:
            text += f"is {losses.y[-1]:.3f}"
        text += " nats per token (lower is better)"
    return text + "."


def _compared(run: RunMetrics, baseline: RunMetrics) -> str:
    sets = [name for name in baseline.set_names if name in run.set_names]
    if not sets:
        return f"{run.name} and {baseline.name} cannot be compared: they have no held-out text in common."
    return f"{run.name} predicts " + "; ".join(_on(name, run, baseline) for name in sets) + "."


def _on(name: str, run: RunMetrics, baseline: RunMetrics) -> str:
    ours, theirs = run.held_out(name), baseline.held_out(name)
    gain = theirs.y[-1] - ours.y[-1]
    losses = f"{ours.y[-1]:.3f} against {theirs.y[-1]:.3f} nats per token"
    if abs(gain) < EQUAL_NATS:
        return f"held-out {name} text as well as {baseline.name} does ({losses})"
    kind, factor = ("better", math.exp(gain)) if gain > 0 else ("worse", math.exp(gain))
    text = (
        f"held-out {name} text {kind} than {baseline.name}: the right token is {factor:.2f} times as likely ({losses})"
    )
    reached, needed = ours.reaches(theirs.y[-1]), theirs.reaches(theirs.y[-1])
    if gain > 0 and reached is not None and needed and reached < needed:
        text += f", and reached its loss with {reached / needed:.0%} of the tokens"
    return text


def _millions(tokens: float) -> str:
    return f"{tokens:,.1f} million" if tokens >= 0.1 else f"{tokens * 1e6:,.0f}"
