"""The offline pass: scores the samples of a run with a frozen reference, in pipelined forward passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.data.loader import Boundaries, MicroBatchSource
from megatron_slm.data.samples import Samples
from megatron_slm.device import local_device
from megatron_slm.engine.channels import Channel, Channels, Lane
from megatron_slm.loss.objective import Objective
from megatron_slm.loss.variants import LossHead
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.collectives import all_gather_objects, broadcast_from_rank_0, raise_on_all_ranks
from megatron_slm.parallel.groups import create_tensor_parallel_group
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.reference.frozen import build_reference
from megatron_slm.reference.manifest import StoreManifest, shard_name
from megatron_slm.reference.store import Scores, begin, token_digests, write_shard
from megatron_slm.run.corpora import boundaries
from megatron_slm.scoring.plan import ScoringPlan
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch

logger = logging.getLogger(__name__)

_LOG_INTERVAL_SECONDS = 10.0


def score_corpus(plan: ScoringPlan) -> StoreManifest:
    """Write the missing shards of the store in `plan.output`. Collective over the world.

    Every pipeline (data-parallel rank) takes one missing shard at a time; after each round the manifest is
    replaced, so that a killed pass loses one round and can be resumed at any layout.

    Returns:
        the manifest of the complete store.

    Raises:
        SlmError: on every rank alike.
    """
    manifest = _agreed_manifest(plan)
    missing = [shard for shard in range(manifest.num_shards) if shard_name(shard) not in manifest.shards]
    if len(missing) < manifest.num_shards:
        logger.info("%d of %d shards exist already", manifest.num_shards - len(missing), manifest.num_shards)
    if not missing:
        return manifest
    scorer = _Scorer(plan, sum(len(manifest.samples_of(shard)) for shard in missing))
    num_pipelines = plan.topology.data
    for first in range(0, len(missing), num_pipelines):
        shards = missing[first : first + num_pipelines]
        mine = shards[scorer.rank.data] if scorer.rank.data < len(shards) else None
        scores = scorer.score(manifest, mine)
        written: dict[str, dict[str, Any]] = {}
        with raise_on_all_ranks():
            if mine is not None and scores is not None:
                written[shard_name(mine)] = write_shard(plan.output, manifest, mine, *scores)
        manifest = _commit(plan, manifest, written)
        scorer.progress.add(sum(len(manifest.samples_of(shard)) for shard in shards))
    return manifest


def _agreed_manifest(plan: ScoringPlan) -> StoreManifest:
    """Begin or resume the store on rank 0; return its manifest on every rank."""
    found: StoreManifest | None = None
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            found = begin(plan.output, plan.manifest())
    found = broadcast_from_rank_0(found)
    assert found is not None, "rank 0 broadcasts a manifest"
    return found


def _commit(plan: ScoringPlan, manifest: StoreManifest, written: dict[str, dict[str, Any]]) -> StoreManifest:
    """Add every rank's shards to the manifest; rank 0 replaces the file."""
    entries = {name: entry for one in all_gather_objects(written) for name, entry in one.items()}
    manifest = manifest.with_shards({**manifest.shards, **entries})
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            manifest.write(plan.output)
    return manifest


class _Scorer:
    """This rank's stage of the reference and its channels."""

    def __init__(self, plan: ScoringPlan, num_samples: int) -> None:
        parallel = plan.config.parallel
        self.rank = plan.topology.coordinate(dist.get_rank())
        self.is_first, self.is_last = self.rank.pipeline == 0, self.rank.pipeline == plan.topology.pipeline - 1
        tp = create_tensor_parallel_group(plan.topology, sequence_parallel=parallel.sequence_parallel)
        divisible = plan.config.model.make_vocab_size_divisible_by
        layers = ParallelLayers(tp, vocabulary_divisible_by=divisible, backends=plan.backends)
        head = LossHead(backend=plan.config.loss_head.loss_head_backend)
        self.objective = Objective(selector=Selector(), tp=tp, head=head)
        self.with_entropy = plan.options.with_entropy
        model = plan.reference
        self.reference = build_reference(model.architecture, model.source, plan.topology, layers, plan.dtype)
        self.device, self.dtype = local_device(), plan.dtype
        self.channels = Channels(plan.topology, dist.get_rank(), self.device, [Lane.REFERENCE], Activity())
        self.b = plan.config.training.micro_batch_size
        length = plan.reference_length // (tp.size if tp.sequence_parallel else 1)
        self.message_shape = (length, self.b, plan.reference.architecture.hidden_size)
        # Every position is scored, so that the store serves runs with any loss mask; padding completes the last
        # micro-batch of a shard.
        ends = replace(boundaries(plan.config, plan.tokenizer), eod_mask_loss=False)
        run_tokens = plan.num_tokens if plan.retokenized is None else plan.tokenizer.vocab_size
        self.run_source = self.source = self._source(plan.samples, run_tokens, ends)
        self.retokenized = plan.retokenized
        if plan.retokenized is not None and plan.reference_tokenizer is not None:
            ends = replace(ends, eod_id=plan.reference_tokenizer.eod_id)
            self.source = self._source(plan.retokenized, plan.num_tokens, ends)
        self.progress = _Progress(num_samples, plan.config.data.seq_length, plan.topology.data)

    def _source(self, samples: Samples, num_tokens: int, ends: Boundaries) -> MicroBatchSource:
        return MicroBatchSource(
            samples,
            micro_batch_size=self.b,
            data_parallel_rank=0,
            data_parallel_size=1,
            vocab_size=num_tokens,
            boundaries=ends,
            pads_at_end=True,
        )

    def score(self, manifest: StoreManifest, shard: int | None) -> tuple[Scores, list[int]] | None:
        """Run a shard through this pipeline; return its scores and token checksums on the rank that writes them.

        Shards start at multiples of the micro-batch size: each micro-batch has the samples of one of the run's, and
        the same bits at the same micro-batch size.
        """
        samples = range(0) if shard is None else manifest.samples_of(shard)
        num_micro_batches = ceil_div(len(samples), self.b)
        batches: list[MicroBatch] = []
        with raise_on_all_ranks():
            if self.is_first or self.is_last or self.source.boundaries.matter_to_layers:
                batches = [self.source.micro_batch(start, 0) for start in samples[:: self.b]]
        parts = self._forward(num_micro_batches, batches)
        if not samples or not self.is_last or self.objective.tp.rank != 0:
            return None
        if self.retokenized is not None:
            batches = [self.run_source.micro_batch(start, 0) for start in samples[:: self.b]]
            parts = [[self._spread(part[0], batch)] for part, batch in zip(parts, batches, strict=True)]
        digests = [digest for batch in batches for digest in token_digests(batch)][: len(samples)]
        loss_bs, *entropy = (torch.cat(column)[: len(samples)].cpu() for column in zip(*parts, strict=True))
        return Scores(loss_bs, entropy[0] if entropy else None), digests

    def _spread(self, loss_bL: Tensor, batch: MicroBatch) -> Tensor:
        """Spread the reference's losses over the run's tokens, [b, s]; 0 where the run has no label."""
        assert self.retokenized is not None, "the reference has another tokenizer"
        rows = torch.zeros(batch.labels_bs.shape)
        for row, loss_L, sample in zip(rows, loss_bL.float().cpu().numpy(), batch.sample_b.tolist(), strict=True):
            if sample < len(self.retokenized):
                row.copy_(torch.from_numpy(self.retokenized.spread(sample, loss_L)))
        return rows.masked_fill_(~batch.valid_bs, 0.0)

    def _forward(self, num_micro_batches: int, batches: Sequence[MicroBatch]) -> list[list[Tensor]]:
        """Run all micro-batches through this stage; on the last one return their statistics, each [b, s]."""
        previous, following = self.channels.previous.get(Lane.REFERENCE), self.channels.next.get(Lane.REFERENCE)
        parts = []
        self._post_receive(previous, posted=0, of=num_micro_batches)
        for i in range(num_micro_batches):
            self._post_receive(previous, posted=i + 1, of=num_micro_batches)  # one ahead of need
            read = batches[i].to(self.device) if batches else None
            if previous is not None:
                x = previous.receive()
            else:
                assert read is not None, "the first stage reads its micro-batches"
                x = read.tokens_bs
            x = self.reference(x, read.documents if read else None)
            if following is not None:
                following.send(x)
            else:
                assert read is not None, "the last stage reads its micro-batches"
                statistics = self.objective.statistics(
                    x, self.reference.output_weight(), read, with_entropy=self.with_entropy
                )
                parts.append([part_N.view_as(read.valid_bs) for part_N in statistics if part_N is not None])
            self.progress.show(i * self.b)
        self.channels.flush()
        return parts

    def _post_receive(self, channel: Channel | None, *, posted: int, of: int) -> None:
        if channel is not None and posted < of:
            channel.post_receive(self.message_shape, self.dtype, self.device)


class _Progress:
    """Logs the rate and the time left; only rank 0's lines are shown."""

    def __init__(self, num_samples: int, sequence_length: int, num_pipelines: int) -> None:
        self.total, self.sequence_length, self.num_pipelines = num_samples, sequence_length, num_pipelines
        self.done = 0
        self.started = self.logged_at = time.monotonic()

    def add(self, num_samples: int) -> None:
        """Count the samples of a finished round."""
        self.done += num_samples
        if self.done == self.total:
            self._log(self.done, time.monotonic())

    def show(self, in_this_shard: int) -> None:
        """Log the progress every 10 s, as if all pipelines were as far as this one."""
        now = time.monotonic()
        if now - self.logged_at >= _LOG_INTERVAL_SECONDS:
            self._log(min(self.total, self.done + in_this_shard * self.num_pipelines), now)

    def _log(self, done: int, now: float) -> None:
        self.logged_at, seconds = now, max(now - self.started, 1e-9)
        left = (self.total - done) * seconds / max(done, 1)
        logger.info(
            "scored %s of %s samples, %s tokens/s, %s left",
            f"{done:,}",
            f"{self.total:,}",
            f"{done * self.sequence_length / seconds:,.0f}",
            time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days",
        )
