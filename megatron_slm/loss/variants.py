"""Variants of the loss head, which trade memory for time: the exponentials kept between its two passes.

With N rows, keep ratio k and a unit of one product [N, d] x [d, V], full logits cost 3 units. Here every row is scored
(1 unit) and the kept ones get gradients (2k units); recomputing the kept rows' logits costs another k.

| variant | units | rows kept between the passes |
|---|---|---|
| `recompute` | 1 + 3k | none |
| `stash` | 1 + 2k | all |
| `predictive` | 1 + 2k, and 1 for each row missed | those with a score near or above the last micro-batch's threshold |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_slm.config.distillation import DistillationConfig
from megatron_slm.config.loss_head import LossHeadConfig
from megatron_slm.loss.kernels import BackendName
from megatron_slm.loss.stash import Stash

VariantName = Literal["auto", "recompute", "stash", "predictive"]
StashDtypeName = Literal["auto", "fp32", "bf16"]

CHUNK_ROWS = 512
"""Rows scored at once where not all rows fit in the stash. Smaller chunks slow the products down: 1.05 units for all
rows at once, 1.23 for chunks of 256 (CPU)."""

BAND = 0.05
"""Share of all rows, below the predicted threshold, that is kept as well; about 0.5 % of rows are missed."""


@dataclass(frozen=True, kw_only=True)
class LossHead:
    """Backend, variant and memory of the loss. Results do not depend on them beyond rounding; time and memory do."""

    backend: BackendName = "auto"
    variant: VariantName = "auto"
    stash_bytes: int = 2**30
    """Most memory that exponentials may take between the passes."""
    stash_dtype: StashDtypeName = "auto"
    """Dtype of the exponentials. auto: fp32 for fp32 models, bf16 for bf16 models, which round gradients of logits to
    bf16 anyway."""

    @classmethod
    def from_config(cls, config: LossHeadConfig, distillation: DistillationConfig) -> LossHead:
        """Build it from a run's flags.

        With a temperature nothing is stashed: exponentials at one lose digits at another.
        """
        return cls(
            backend=config.loss_head_backend,
            variant="recompute" if distillation.tempers else config.loss_head_variant,
            stash_bytes=config.loss_head_stash_mib * 2**20,
            stash_dtype=config.loss_head_stash_dtype,
        )

    def plan(self, num_rows: int, num_columns: int, keep_ratio: float, dtype: torch.dtype) -> StashPlan:
        """Plan the stash of one micro-batch.

        Args:
            num_columns: vocabulary rows held here.
            keep_ratio: approximate share of the rows that will be kept.
            dtype: of the hidden states.
        """
        stash_dtype = self._dtype(dtype)
        rows_in_budget = self.stash_bytes // max(1, num_columns * stash_dtype.itemsize)
        predicted = min(num_rows, math.ceil(min(1.0, keep_ratio + 2 * BAND) * num_rows))
        variant = self.variant
        if variant == "auto":
            variant = self._choose(num_rows, predicted + CHUNK_ROWS, rows_in_budget, keep_ratio)
        wanted = num_rows if variant == "stash" else predicted
        if variant == "recompute" or rows_in_budget < min(2, num_rows):
            return StashPlan("recompute", 0, num_rows, stash_dtype)
        if wanted == num_rows <= rows_in_budget:  # space for all rows: each is written to its slot at once
            return StashPlan(variant, num_rows, num_rows, stash_dtype)
        chunk_rows = min(CHUNK_ROWS, num_rows, rows_in_budget // 2)  # otherwise one chunk passes through first
        capacity = min(wanted, rows_in_budget - chunk_rows - 1)  # and one row takes what is not kept
        if capacity < 1:
            return StashPlan("recompute", 0, num_rows, stash_dtype)
        return StashPlan(variant, capacity, chunk_rows, stash_dtype)

    @staticmethod
    def _choose(num_rows: int, predicted_rows: int, rows_in_budget: int, keep_ratio: float) -> VariantName:
        if rows_in_budget >= num_rows:
            return "stash"
        if rows_in_budget >= predicted_rows or keep_ratio >= 2 / 3:  # from there on recomputing costs more than CLM
            return "predictive"
        return "recompute"

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.stash_dtype == "bf16" or (self.stash_dtype == "auto" and dtype == torch.bfloat16):
            return torch.bfloat16
        return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class StashPlan:
    """Plan of one micro-batch's stash."""

    variant: VariantName
    capacity: int
    """Most rows that are kept."""
    chunk_rows: int
    """Rows scored at once."""
    dtype: torch.dtype

    def stash(self, hidden_Nd: Tensor, weight_Vd: Tensor) -> Stash | None:
        """Allocate the stash, empty; None for `recompute`."""
        if self.capacity <= 0:
            return None
        return Stash(hidden_Nd, weight_Vd, capacity=self.capacity, chunk_rows=self.chunk_rows, dtype=self.dtype)
