"""Configuration of the distillation from the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import flag, require


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Loss of the kept tokens: cross-entropy, or mixed with a divergence from the reference's distribution."""

    loss: Literal["ce", "kl", "reverse-kl", "jsd"] = "ce"
    """Loss of the kept tokens. ce: cross-entropy. The others add the divergence between the distributions q of the
    reference and p of the model. kl: KL(q || p). reverse-kl: KL(p || q). jsd: the generalized Jensen-Shannon
    divergence (see --distillation-skew)."""
    distillation_weight: float = 0.5
    """Weight a of the divergence D in the loss (1 - a) CE + a T^2 D, in [0, 1]."""
    distillation_temperature: float = 1.0
    """Temperature T that both models' logits are divided by in the divergence."""
    distillation_skew: float = 0.5
    """Weight s of the reference in the mixture m = s q + (1 - s) p of --loss jsd, in (0, 1):
    s KL(q || m) + (1 - s) KL(p || m)."""

    def __post_init__(self) -> None:
        in_range = 0 <= self.distillation_weight <= 1
        require(in_range, self, "distillation_weight", "be in [0, 1]", "use e.g. 0.5")
        positive = 0 < self.distillation_temperature < math.inf
        require(positive, self, "distillation_temperature", "be positive and finite", "use e.g. 1.0")
        require(0 < self.distillation_skew < 1, self, "distillation_skew", "be in (0, 1)", "use e.g. 0.5")
        for name, users in (
            ("distillation_weight", "kl, reverse-kl or jsd"),
            ("distillation_temperature", "kl, reverse-kl or jsd"),
            ("distillation_skew", "jsd"),
        ):
            default = getattr(type(self), name)
            used = self.loss == "jsd" if users == "jsd" else self.loss != "ce"
            rule = f"be used with --loss {users}"
            require(used or getattr(self, name) == default, self, name, rule, f"remove {flag(name)}")

    @property
    def distills(self) -> bool:
        """True if the loss has a divergence from the reference."""
        return self.loss != "ce"

    @property
    def tempers(self) -> bool:
        """True if the divergence is at another temperature than the cross-entropy."""
        return self.distills and self.distillation_temperature != 1.0

    @property
    def num_passes(self) -> int:
        """Number of passes over the kept rows' logits of both models, where the reference runs.

        One computes the gradient, and for kl the value; reverse-kl and jsd need their value first, and a temperature
        its sums of exponentials.
        """
        return 1 + (self.loss != "kl") + self.tempers
