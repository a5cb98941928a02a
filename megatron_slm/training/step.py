"""One training step, whichever engine runs it."""

from __future__ import annotations

import logging
import time

from megatron_slm.engine.refusal import refusal
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
    refused = refusal(sums, settings)
    if refused is None and engine.skipped_steps > skipped_before:
        refused = "nonfinite-gradient"
    assert (refused is not None) == (engine.skipped_steps > skipped_before), "a refused step is not applied"
    return StepResult(
        sums=sums,
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        refused=refused,
        seconds=time.perf_counter() - started,
        rows=None if trainer.rows is None else trainer.rows.last,
    )
