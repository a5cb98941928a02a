"""One training step, on either engine."""

from __future__ import annotations

import time

from megatron_slm.engine.skipping import SkipReason, skip_reason
from megatron_slm.engine.trainer import BatchSource, StepResult, Trainer
from megatron_slm.loss.objective import StepSettings


def train_step(
    trainer: Trainer, source: BatchSource, settings: StepSettings, *, learning_rate: float, is_last: bool
) -> StepResult:
    """Set the learning rate and run one step: forward, backward, optimizer. Collective over the world.

    Args:
        source: reads the step's micro-batches.
        is_last: no step follows, so that nothing of a next one is read or computed ahead.
    """
    started, engine = time.perf_counter(), trainer.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    skipped_before = engine.skipped_steps
    sums = trainer.train_step(source, settings, is_last=is_last)
    skipped = engine.skipped_steps > skipped_before
    exceeding = trainer.exceeding_norm
    found_by_optimizer: SkipReason = "nonfinite-gradient" if exceeding is None else "gradient-norm"
    reason = skip_reason(sums, settings) or (found_by_optimizer if skipped else None)
    assert skipped == (reason is not None), "the optimizer skips the steps that have a reason, and no others"
    return StepResult(
        sums=sums,
        grad_norm=float(engine.get_global_grad_norm() or 0.0) if exceeding is None else exceeding,
        skip_reason=reason,
        seconds=time.perf_counter() - started,
        rows=None if trainer.rows is None else trainer.rows.last,
    )
