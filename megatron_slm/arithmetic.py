"""Integer arithmetic."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """Return `numerator / denominator` rounded up, exact for integers of any size."""
    return -(-numerator // denominator)
