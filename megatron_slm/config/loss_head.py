"""The selective loss head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require


@dataclass(frozen=True, kw_only=True)
class LossHeadConfig:
    """How the loss spends memory to save time; results do not depend on it beyond rounding."""

    loss_head_variant: Literal["auto", "recompute", "stash", "predictive"] = "auto"
    """What is kept between the scoring of all tokens and the gradients of the kept ones: nothing (recompute), every
    token's exponentials (stash), those of tokens that will probably be kept (predictive), or whichever of these
    --loss-head-stash-mib and --slm-keep-ratio make the cheapest (auto)."""
    loss_head_stash_mib: int = 1024
    """Most memory, in MiB, for what is kept; 0 keeps nothing."""
    loss_head_stash_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Its precision; auto: that of the model."""
    loss_head_backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the loss; auto: triton on a GPU where it is installed, else torch."""

    def __post_init__(self) -> None:
        mib = self.loss_head_stash_mib
        require(mib >= 0, "loss_head_stash_mib", mib, "is 0 or more", "give 0 to keep nothing")
