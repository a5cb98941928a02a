"""One training step, whichever engine runs it."""

from __future__ import annotations

import logging
import time

from megatron_slm.engine.skipping import skip_reason
from megatron_slm.engine.trainer import BatchSource, StepResult, Trainer
from megatron_slm.loss.objective import StepSettings

logger = logging.getLogger(__name__)


def train_step(
    trainer: Trainer, source: BatchSource, settings: StepSettings, *, learning_rate: float, is_last: bool
) -> StepResult:
    """Set the learning rate, run one step, and say what it did."""
    started = time.perf_counter()
    engine = trainer.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    skipped_before = engine.skipped_steps
    sums = trainer.train_step(source, settings, is_last=is_last)
    skipped, reason = engine.skipped_steps > skipped_before, skip_reason(sums, settings)
    assert skipped or reason is None, "a step with a reason to be skipped was applied"
    if skipped and reason is None:
        reason = "nonfinite-gradient"
    return StepResult(
        sums=sums,
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        skip_reason=reason,
        seconds=time.perf_counter() - started,
    )
