"""Intervals of steps."""

from __future__ import annotations


def is_due(step: int, interval: int | None, last: int) -> bool:
    """True after every `interval` steps and after the last one; with None after the last one only."""
    return step == last or (interval is not None and step % interval == 0)
