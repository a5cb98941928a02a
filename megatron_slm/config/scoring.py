"""Options of the scoring pass, beside the run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_positive

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
    retokenize: bool = False
    """Score in the tokens of the reference's own tokenizer, and spread its losses over the run's tokens."""
    reference_seq_length: int | None = None
    """Inputs of a sample in the reference's tokens, with `retokenize`; None: the run's --seq-length."""

    def __post_init__(self) -> None:
        rule = "not be used with --retokenize: entropies of one vocabulary are none of another"
        require(not (self.retokenize and self.with_entropy), self, "with_entropy", rule, "leave it out")
        rule = "be used with --retokenize"
        given = self.retokenize or self.reference_seq_length is None
        require(given, self, "reference_seq_length", rule, "add --retokenize, or leave it out")
        require_positive(self, "reference_seq_length")
