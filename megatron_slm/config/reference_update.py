"""Configuration of a reference that follows the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import flag, require, require_given, require_positive


@dataclass(frozen=True, kw_only=True)
class ReferenceUpdateConfig:
    """Update of the reference, of the model's architecture, from its weights; without one the reference is frozen."""

    reference_update: Literal["none", "ema", "history"] = "none"
    """Update of the reference during training. none: it stays as loaded. ema: an exponential moving average of the
    model's weights. history: the model's weights at the last update."""
    reference_update_interval: int | None = None
    """Number of steps from one update to the next. Between two updates the reference runs ahead as scheduled
    (--reference-schedule), never across one. Default: 1 for ema."""
    reference_update_decay: float = 0.999
    """Weight of the preceding average in an update of ema, in (0, 1)."""

    def __post_init__(self) -> None:
        require_positive(self, "reference_update_interval")
        require(0 < self.reference_update_decay < 1, self, "reference_update_decay", "be in (0, 1)", "use e.g. 0.999")
        kind, interval = self.reference_update, self.reference_update_interval
        if kind == "history":
            fix = "set it to the number of steps that the reference stays behind at most"
            require_given(interval is not None, "reference_update_interval", "--reference-update history", fix)
        unused = kind != "none" or interval is None
        rule = "be used with --reference-update ema or history"
        require(unused, self, "reference_update_interval", rule, f"remove {flag('reference_update_interval')}")
        is_default = self.reference_update_decay == type(self).reference_update_decay
        rule = "be used with --reference-update ema"
        fix = f"remove {flag('reference_update_decay')}"
        require(kind == "ema" or is_default, self, "reference_update_decay", rule, fix)

    @property
    def updates(self) -> bool:
        """True if the reference follows the model."""
        return self.reference_update != "none"

    @property
    def decay(self) -> float:
        """Weight of the reference's preceding weights in an update."""
        return self.reference_update_decay if self.reference_update == "ema" else 0.0

    def is_due(self, step: int) -> bool:
        """True if the reference is updated after a step."""
        return self.updates and step % (self.reference_update_interval or 1) == 0
