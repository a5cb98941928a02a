"""Held-out losses during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.engine.trainer import Trainer
from megatron_slm.loss.sums import LossSums
from megatron_slm.parallel.collectives import raise_on_all_ranks
from megatron_slm.telemetry.metrics import evaluation_loss


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """A named set, read from its start on every evaluation."""

    name: str
    source: MicroBatchSource
    num_global_batches: int
    reads: bool
    """Whether this rank's stage needs the micro-batches."""
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

    Collective. One pass through the pipeline for each global batch.

    Args:
        before_batch: what it raises, on all ranks alike, ends the evaluation.

    Raises:
        CorpusError, VocabularyError: the set cannot be read; on every rank alike, with nothing under way.
    """
    sums = LossSums()
    for batch in range(held_out.num_global_batches):
        before_batch()
        read = partial(held_out.source.micro_batch, batch * global_batch_size)
        with raise_on_all_ranks():  # before anything is sent, so that no rank waits for one that cannot read
            micro_batches = [read(i) for i in range(num_micro_batches)] if held_out.reads else []
        sums = sums + trainer.evaluate(micro_batches.__getitem__, num_micro_batches)
    return evaluation_loss(sums)
