"""Configuration of the selective loss head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require_not_negative


@dataclass(frozen=True, kw_only=True)
class LossHeadConfig:
    """Trade-off between memory and time in the loss; results agree up to rounding."""

    loss_head_variant: Literal["auto", "recompute", "stash", "predictive"] = "auto"
    """Exponentials of the logits stored between the scoring pass and the gradient pass. recompute: none. stash: those
    of every token. predictive: those of tokens likely to be kept. auto: the fastest of these that fits
    --loss-head-stash-mib."""
    loss_head_stash_mib: int = 1024
    """Largest stash, in MiB; 0 disables it."""
    loss_head_stash_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the stash. auto: the model's."""
    loss_head_backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the loss. auto: triton on a GPU where it is installed, else torch."""

    def __post_init__(self) -> None:
        require_not_negative(self, "loss_head_stash_mib")
