"""The state of a run that changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_slm.loss.sums import LossSums


@dataclass
class Position:
    """Where a run stands; the only part of it that changes from step to step."""

    step: int = 0
    consumed_samples: int = 0
    adam_step: int = 0
    score_threshold: float | None = None
    """The running threshold of --slm-policy quantile; None before there is one."""
    probe_kept: Tensor | None = None
    """What the last probe kept, bool [samples, s]; None before the first."""
    tokens_seen: int | None = 0
    """Valid tokens so far; None if the run goes on from a checkpoint that does not say."""
    tokens_kept: int | None = 0
    """How many of them were trained on."""
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps, that spikes are told by."""
    row_shares: list[int] = field(default_factory=list)
    """Sixteenths of the rows of each block's backward pass; empty where nothing controls them."""

    def count(self, sums: LossSums) -> None:
        """Add the tokens of a step that was applied."""
        if self.tokens_seen is not None and self.tokens_kept is not None:
            self.tokens_seen += round(sums.valid_tokens)
            self.tokens_kept += round(sums.kept_tokens)

    @property
    def skipped_steps(self) -> int:
        """Steps so far that were not applied."""
        return self.step - self.adam_step


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    consumed_samples: int
    adam_step: int
    score_threshold: float | None = None
    tokens_seen: int | None = 0
    tokens_kept: int | None = 0
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps, that spikes are told by."""
    row_shares: list[int] = field(default_factory=list)
    """Sixteenths of the rows of each block's backward pass; empty where nothing controls them."""
    probe_kept: Tensor | None = None
    """Which tokens the last probe kept, bool [samples, s]; the same on every rank."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the run stands in each of its corpora (`BlendedSamples.state`)."""
