"""The section of flags for the blocks' backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import require, require_given

STEPS = 16
"""A controlled share of the rows is a multiple of 1 / STEPS, so that tensors have few shapes."""


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """Rows of the gradient that the decoder blocks' backward pass runs on (docs/row-sampling.md)."""

    backward_rows: Literal["exact", "sampled", "kept"] = "exact"
    """exact: all rows. sampled: a weighted sample of the rows, by the norm of their gradient; the gradient is an
    unbiased estimate of the exact one. kept: the rows of kept tokens, with keys and values of all other tokens as
    constants; the cheapest, and biased."""
    backward_row_share: float | None = None
    """Share of the rows that --backward-rows sampled draws in every block, in (0, 1]; 1 is the exact backward pass."""
    backward_row_variance: float | None = None
    """Variance that --backward-rows sampled may add in a block, relative to the squared norm of its gradient; each
    block's share follows what was measured in earlier steps, in sixteenths. 0.02 is recommended."""
    backward_row_share_range: list[float] = field(default_factory=lambda: [0.25, 1.0])
    """Lowest and highest share that --backward-row-variance may choose; every block starts at the highest."""

    def __post_init__(self) -> None:
        share, variance, ends = self.backward_row_share, self.backward_row_variance, self.backward_row_share_range
        is_sampled = self.backward_rows == "sampled"
        both = share is not None and variance is not None
        require(not both, self, "backward_row_share", "be left out with --backward-row-variance", "choose one of them")
        for name in ("backward_row_share", "backward_row_variance"):
            rule = f"be left out with --backward-rows {self.backward_rows}"
            fix = "remove it, or add --backward-rows sampled"
            require(getattr(self, name) is None or is_sampled, self, name, rule, fix)
        require_given(
            not is_sampled or share is not None or variance is not None,
            "backward_row_variance",
            "--backward-rows sampled",
            "add --backward-row-variance 0.02",
        )
        fix = "use a share such as 0.7"
        require(share is None or 0.0 < share <= 1.0, self, "backward_row_share", "lie in (0, 1]", fix)
        fix = "use 0.02, or up to 0.05 for a cheaper step"
        require(variance is None or 0.0 < variance < 1.0, self, "backward_row_variance", "lie in (0, 1)", fix)
        lowest, highest = self.sixteenths if len(ends) == 2 and all(map(math.isfinite, ends)) else (1, 0)
        require(
            len(ends) == 2 and ends[0] > 0.0 and ends[1] <= 1.0 and lowest <= highest,
            self,
            "backward_row_share_range",
            "be a lowest and a highest share in (0, 1] with a sixteenth between them",
            "use e.g. 0.25 1.0",
        )

    @property
    def sixteenths(self) -> tuple[int, int]:
        """The lowest and the highest number of sixteenths that a controlled share may have."""
        lowest, highest = self.backward_row_share_range
        return math.ceil(round(lowest * STEPS, 9)), math.floor(round(highest * STEPS, 9))

    @property
    def is_exact(self) -> bool:
        """True if every backward pass runs on all rows, unchanged."""
        return self.backward_rows == "exact" or self.backward_row_share == 1.0

    @property
    def is_controlled(self) -> bool:
        """True if the blocks' shares follow the measured variance."""
        return self.backward_row_variance is not None


def predicted_variance(share: float, keep_ratio: float) -> float:
    """Added variance of the block with most, relative to the squared norm of its gradient, before a run measures it.

    A fit to models of 3 to 12 layers that train on 30 to 100 % of the tokens; wrong by a factor of two at most there.
    """
    return 0.02 * math.exp(_SLOPE * (_share_of_two_percent(keep_ratio) - share)) if share < 1.0 else 0.0


def planned_share(config: BackwardConfig, keep_ratio: float) -> float:
    """Share of the rows that blocks' backward passes run on, about: for planning, never for results.

    Args:
        keep_ratio: share of the tokens that are kept.
    """
    if config.is_exact:
        return 1.0
    if config.backward_rows == "kept":
        return keep_ratio
    if config.backward_row_share is not None:
        return config.backward_row_share
    assert config.backward_row_variance is not None, "checked above"
    share = _share_of_two_percent(keep_ratio) - math.log(config.backward_row_variance / 0.02) / _SLOPE
    lowest, highest = config.sixteenths
    mean_share = share - _TOP_BLOCKS_NEED_LESS
    return min(highest, max(lowest, math.ceil(mean_share * STEPS))) / STEPS


_SLOPE = 11.0
_TOP_BLOCKS_NEED_LESS = 0.03
"""Mean over blocks of what they need less than the one at the bottom."""


def _share_of_two_percent(keep_ratio: float) -> float:
    return 0.5 + keep_ratio / 3
