"""Configuration of the optimizer, the learning rate and the batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_given, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate. 0 leaves the weights as they are."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Shape of the decay from --lr to --min-lr."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_decay_iters: int | None = None
    """Step at which the decay ends. Default: --train-iters."""
    lr_wsd_decay_iters: int | None = None
    """Length in steps of the final linear decay of WSD (warm-up, stable, decay)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.95
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 disables clipping."""

    def __post_init__(self) -> None:
        require_positive(self, "lr_decay_iters", "lr_wsd_decay_iters", "adam_eps")
        require_not_negative(self, "lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, self, name, "be in [0, 1)", "use e.g. 0.9")
        require(self.min_lr <= self.lr, self, "min_lr", f"not exceed --lr ({self.lr})", "lower it")
        if self.lr_decay_style == "WSD":
            fix = "set it to the length of the final decay, in steps"
            given = self.lr_wsd_decay_iters is not None
            require_given(given, "lr_wsd_decay_iters", "--lr-decay-style WSD", fix)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch sizes, precision and length of the run."""

    train_iters: int
    """Total number of steps of the run. Required."""
    micro_batch_size: int = 1
    """Samples per forward pass of one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples per step over all ranks. Default: micro-batch size x data-parallel size."""
    step_batch_size_schedule: str | None = None
    """Samples per step over all ranks by the tokens drawn so far, instead of --global-batch-size: `0:768 250B:1536`.
    Tokens may have a suffix K, M, B or T (10^3, 10^6, 10^9, 10^12)."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights and fp32 gradient accumulation. Default: fp32."""
    seed: int = 1234
    """Seed of the initial weights and the sample order."""
    max_skipped_steps: int = 20
    """Save a checkpoint and stop after this many skipped steps in a row. A step is skipped if losses or gradients are
    not finite, no token was kept, with --skip-loss-spikes the loss spiked, or the gradient norm exceeds
    --grad-norm-skip-threshold."""

    def __post_init__(self) -> None:
        require_positive(self, "train_iters", "micro_batch_size", "global_batch_size", "max_skipped_steps")
        require_not_negative(self, "seed")
        if self.step_batch_size_schedule is not None:
            rule = "not be used with --step-batch-size-schedule"
            require(self.global_batch_size is None, self, "global_batch_size", rule, "remove one of them")
