"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megatron_slm.config.optimizer import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """Return the learning rate of the step after `step` finished ones.

    A linear warm-up to `lr` (the first step takes lr / warm-up), then one of: `constant`; `linear` or `cosine`
    down to `min_lr` at `lr_decay_iters`; `WSD`, constant until the last `lr_wsd_decay_iters` steps before
    `lr_decay_iters`, then linear down to `min_lr`.
    """
    warmup, end = config.lr_warmup_iters, config.lr_decay_iters or train_iters
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    start = warmup if config.lr_decay_style != "WSD" else max(warmup, end - (config.lr_wsd_decay_iters or 0))
    if step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, end - start))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_decay_style == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * share
