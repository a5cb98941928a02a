"""Options of the scoring pass, beside the run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_positive

ScoreDtype = Literal["float32", "bfloat16", "float16"]
LogprobDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of a scoring pass."""

    output: str
    """The store's folder."""
    score_dtype: ScoreDtype = "float32"
    """Data type of the stored scores."""
    with_entropy: bool = False
    """Store the entropy of the reference's prediction too."""
    top_logprobs: int | None = None
    """Store the log-probabilities of this many most probable ids a token, and the rest's."""
    sampled_ids: int | None = None
    """Store this many ids a token drawn from the reference's distribution, and its entropy."""
    logprobs_dtype: LogprobDtype = "bfloat16"
    """Data type of the log-probabilities."""
    retokenize: bool = False
    """Score in the tokens of the reference's own tokenizer, and spread its losses over the run's tokens."""
    reference_seq_length: int | None = None
    """Inputs of a sample in the reference's tokens, with `retokenize`; None: the run's --seq-length."""

    def __post_init__(self) -> None:
        for name in ("top_logprobs", "sampled_ids"):
            require_positive(self, name)
        alone = self.top_logprobs is None or self.sampled_ids is None
        require(alone, self, "sampled_ids", "not be used with --top-logprobs", "remove one of them")
        rule = "not be used with --retokenize: probabilities of one vocabulary are none of another"
        for name in ("top_logprobs", "sampled_ids"):
            require(not self.retokenize or getattr(self, name) is None, self, name, rule, "leave it out")
        rule = "not be used with --retokenize: entropies of one vocabulary are none of another"
        require(not (self.retokenize and self.with_entropy), self, "with_entropy", rule, "leave it out")
        rule = "be used with --retokenize"
        given = self.retokenize or self.reference_seq_length is None
        require(given, self, "reference_seq_length", rule, "add --retokenize, or leave it out")
        require_positive(self, "reference_seq_length")
