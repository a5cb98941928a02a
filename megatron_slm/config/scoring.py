"""Options of the scoring pass, beside the run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScoreDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of a scoring pass."""

    output: str
    """The store's folder."""
    score_dtype: ScoreDtype = "float32"
    """Data type of the stored scores."""
    with_entropy: bool = False
    """Store the entropy of the reference's prediction too."""
