"""Schedule of the keep ratio: a function of the step alone, so that a resumed run follows it without saved state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KeepSchedule:
    """A warm-up on all tokens, then a change from one keep ratio to another."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_iters: int = 0
    """Number of first steps that keep all tokens."""
    decay_iters: int = 0
    """Number of steps from `start` to the final ratio, after the warm-up."""
    start: float = 1.0
    """Ratio at the first step after the warm-up."""

    def warming_up(self, step: int) -> bool:
        """Return True if a step (counted from 0) keeps all tokens, independent of the policy."""
        return step < self.warmup_iters

    def ratio(self, step: int, final: float) -> float:
        """Return the ratio of a step (counted from 0): 1, then from `start` to `final`, then `final`.

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
