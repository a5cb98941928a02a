"""Sources of training, evaluation and probe batches."""

from __future__ import annotations

import torch.distributed as dist

from megatron_slm.data.loader import MicroBatchSource, num_global_batches
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.data.samples import Samples
from megatron_slm.run.corpora import boundaries
from megatron_slm.run.plan import Plan
from megatron_slm.training.evaluation import HeldOutSet


def micro_batch_source(plan: Plan, samples: Samples, *, pads_at_end: bool) -> MicroBatchSource:
    """Build this rank's source of micro-batches of `samples`."""
    return MicroBatchSource(
        samples,
        micro_batch_size=plan.config.training.micro_batch_size,
        data_parallel_rank=plan.topology.coordinate(dist.get_rank()).data,
        data_parallel_size=plan.topology.data,
        vocab_size=plan.num_tokens,
        boundaries=boundaries(plan.config, plan.tokenizer),
        pads_at_end=pads_at_end,
    )


def train_prefetcher(plan: Plan, source: MicroBatchSource) -> Prefetcher:
    """Reads ahead on the ranks that read at all."""
    return Prefetcher(
        source,
        num_micro_batches=plan.num_micro_batches,
        num_samples=len(plan.train_samples),
        num_threads=plan.config.data.num_workers if _reads(plan, source) else 0,
    )


def _reads(plan: Plan, source: MicroBatchSource) -> bool:
    """Whether this rank's stage needs micro-batches: the first and the last do, the others where documents matter."""
    stage = plan.topology.coordinate(dist.get_rank()).pipeline
    return stage in (0, plan.topology.pipeline - 1) or source.boundaries.matter_to_layers


def held_out_sets(plan: Plan) -> list[HeldOutSet]:
    """Build the held-out sets of the run, each with its own source."""
    sets = []
    for name, samples in (*plan.held_out.items(), *plan.test.items()):
        count = num_global_batches(len(samples), plan.global_batch_size)
        if plan.config.logging.eval_iters is not None:
            count = min(count, plan.config.logging.eval_iters)
        source, at_end = micro_batch_source(plan, samples, pads_at_end=True), name in plan.test
        reads = _reads(plan, source)
        sets.append(HeldOutSet(name=name, source=source, num_global_batches=count, reads=reads, only_at_end=at_end))
    return sets
