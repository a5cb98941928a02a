"""Stability of the selection: the tokens kept of one fixed batch, compared from probe to probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.checkpoint.state import RunState
from megatron_slm.training.fixed_batch import FixedBatch


class SelectionChange(NamedTuple):
    """The selection on the fixed batch, compared with the last probe's."""

    kept_tokens: int
    agreement: float | None
    """Overlap with the last probe's kept tokens, 0 to 1 (see `agreement`); None at the first probe."""


@dataclass(frozen=True, kw_only=True)
class SelectionProbe:
    """Selects on the run's first global batch every `interval` steps (--slm-probe-interval)."""

    batch: FixedBatch
    interval: int

    def is_due(self, step: int) -> bool:
        """True after every `interval` steps."""
        return step % self.interval == 0

    def prepare(self, step: int, last: int) -> None:
        """Run the reference on the batch if a probe is due after `step` and until `last`. Collective."""
        if last // self.interval > step // self.interval:
            self.batch.run_reference()

    def measure(self, state: RunState) -> SelectionChange:
        """Select with the current weights; the run's state keeps the selection for the next probe. Collective."""
        probed = self.batch.measure(state, selects=True)
        parts_bs = [one.kept_bs for one in probed if one.kept_bs is not None]
        kept_Bs = self.batch.gather(parts_bs, torch.uint8).bool().cpu()
        change = SelectionChange(int(kept_Bs.sum()), agreement(state.probe_kept, kept_Bs))
        state.probe_kept = kept_Bs
        return change


def agreement(before: Tensor | None, now: Tensor) -> float | None:
    """`|A ∩ B| / |A ∪ B|` of two sets of kept tokens, both masks; 1 where nothing changed.

    None without an earlier set, with one of another shape, and where both are empty.
    """
    if before is None or before.shape != now.shape:
        return None
    union = int((before | now).sum())
    return int((before & now).sum()) / union if union else None
