"""Held-out losses during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.loss.objective import LossSums
from megatron_slm.training.metrics import evaluation_loss
from megatron_slm.training.step import Trainer


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """A named set, read from its start on every evaluation."""

    name: str
    source: MicroBatchSource
    num_global_batches: int
    only_at_end: bool = False
    """Evaluated at the end of the run alone (a test set)."""


def evaluate(
    trainer: Trainer,
    held_out: HeldOutSet,
    *,
    global_batch_size: int,
    num_micro_batches: int,
    before_batch: Callable[[], None] = lambda: None,
) -> float | None:
    """Mean loss in nats over the set's valid tokens, each counted once at any layout; None where not finite.

    Collective. One pass through the pipeline for each global batch. What `before_batch` raises, on all ranks, ends it.
    """
    sums = LossSums()
    for batch in range(held_out.num_global_batches):
        before_batch()
        source = partial(held_out.source.micro_batch, batch * global_batch_size)
        sums = sums + trainer.evaluate(source, num_micro_batches)
    return evaluation_loss(sums)
