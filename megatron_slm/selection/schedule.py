"""The share of tokens that is kept, as a function of the step alone: a resumed run follows it by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KeepSchedule:
    """Full training first, then from one share to another."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_iters: int = 0
    """Steps at the start that keep everything."""
    decay_iters: int = 0
    """Steps from `start` to the final share, after the warm-up."""
    start: float = 1.0
    """The share at the decay's first step."""

    def warming_up(self, step: int) -> bool:
        """Whether a step (counted from 0) keeps everything, whatever the policy."""
        return step < self.warmup_iters

    def ratio(self, step: int, final: float) -> float:
        """The share kept in a step (counted from 0): 1, then from `start` to `final`, then `final`.

        linear: start + (final - start) p; cosine: final + (start - final) (1 + cos(pi p)) / 2, with
        p = (step - warmup) / decay.
        """
        if self.warming_up(step):
            return 1.0
        done = step - self.warmup_iters
        if self.kind == "constant" or done >= self.decay_iters:
            return final
        progress = done / self.decay_iters
        if self.kind == "linear":
            return self.start + (final - self.start) * progress
        return final + (self.start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
