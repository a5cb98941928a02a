"""Optimizer, learning rate and batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """How the learning rate falls from --lr to --min-lr."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: int | None = None
    """Step at which the decay ends; default: --train-iters."""
    lr_wsd_decay_iters: int | None = None
    """Length of the final linear decay of WSD (warm-up, stable, decay), in steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "lr_decay_iters", "lr_wsd_decay_iters", "adam_eps")
        for name in ("min_lr", "lr_warmup_iters", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "is 0 or more", "give 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "lies in [0, 1)", "use e.g. 0.9")
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"is at most --lr ({self.lr})", "lower it")
        require(
            self.lr_decay_style != "WSD" or self.lr_wsd_decay_iters is not None,
            "lr_wsd_decay_iters",
            None,
            "is given when --lr-decay-style is WSD",
            "give the length of the final decay in steps",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, precision and length of the run."""

    train_iters: int
    """Steps of the whole run."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples of one step over all ranks; default: micro-batch size x data-parallel size."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights and fp32 gradient accumulation (default: fp32)."""
    seed: int = 1234
    """Of initial weights and of the sample order."""
    max_skipped_steps: int = 20
    """Stop, with a checkpoint, after this many steps in a row that were not applied: losses or gradients were not
    finite, no token was kept, or (--skip-loss-spikes) the loss was a spike."""

    def __post_init__(self) -> None:
        require_positive(self, "train_iters", "micro_batch_size", "global_batch_size", "max_skipped_steps")
        require(self.seed >= 0, "seed", self.seed, "is 0 or more", "give 0 or more")
