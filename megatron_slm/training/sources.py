"""Sources of training, evaluation and probe batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_slm.data.loader import MicroBatchSource, num_global_batches
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.data.samples import Samples
from megatron_slm.run.corpora import boundaries
from megatron_slm.run.plan import Plan


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """A named held-out set, read from its start at every evaluation."""

    name: str
    source: MicroBatchSource
    num_global_batches: int
    reads: bool
    """This rank's stage needs the micro-batches."""
    only_at_end: bool = False
    """A test set: evaluated after the last step only."""


def micro_batch_source(plan: Plan, samples: Samples, *, pads_at_end: bool) -> MicroBatchSource:
    """Build this rank's source of micro-batches of `samples`."""
    return MicroBatchSource(
        samples,
        micro_batch_size=plan.config.training.micro_batch_size,
        data_parallel_rank=plan.topology.coordinate(dist.get_rank()).data,
        data_parallel_size=plan.topology.data,
        vocab_size=plan.models.num_tokens,
        boundaries=boundaries(plan.config, plan.models.tokenizer),
        pads_at_end=pads_at_end,
    )


def train_prefetcher(plan: Plan, source: MicroBatchSource) -> Prefetcher:
    """Build the reader of training batches, which reads ahead on the stages that need micro-batches."""
    return Prefetcher(
        source,
        batch_sizes=plan.batch_sizes,
        num_samples=len(plan.data.train),
        num_threads=plan.config.data.num_workers if _reads(plan, source) else 0,
    )


def _reads(plan: Plan, source: MicroBatchSource) -> bool:
    """True on the first and the last stage, and on every stage where attention keeps documents apart."""
    stage = plan.topology.coordinate(dist.get_rank()).pipeline
    return stage in (0, plan.topology.pipeline - 1) or source.boundaries.matter_to_layers


def held_out_sets(plan: Plan) -> list[HeldOutSet]:
    """Build the held-out sets of the run, each with its own source."""
    sets = []
    for name, samples in (*plan.data.valid.items(), *plan.data.test.items()):
        count = num_global_batches(len(samples), plan.eval_batch_size)
        if plan.config.logging.eval_iters is not None:
            count = min(count, plan.config.logging.eval_iters)
        source, at_end = micro_batch_source(plan, samples, pads_at_end=True), name in plan.data.test
        reads = _reads(plan, source)
        sets.append(HeldOutSet(name=name, source=source, num_global_batches=count, reads=reads, only_at_end=at_end))
    return sets
