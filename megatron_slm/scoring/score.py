"""The offline pass: scores the samples of a run with a frozen reference, in pipelined forward passes."""

from __future__ import annotations

import logging
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
from megatron_slm.loss.class_probabilities import most_probable, sampled
from megatron_slm.loss.objective import Objective
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.variants import LossHead
from megatron_slm.loss.vocab_parallel import loss_rows
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.channels import Channel, Channels, Lane
from megatron_slm.parallel.collectives import all_gather_objects, broadcast_from_rank_0
from megatron_slm.parallel.context import cut_batch, gather_samples
from megatron_slm.parallel.groups import create_context_parallel_group, create_tensor_parallel_group
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.progress import Progress, show_progress
from megatron_slm.reference.frozen import build_reference
from megatron_slm.reference.manifest import StoreManifest, shard_name
from megatron_slm.reference.probabilities import Probabilities
from megatron_slm.reference.store import Scores, begin, token_digests, write_shard
from megatron_slm.run.corpora import boundaries
from megatron_slm.scoring.plan import ScoringPlan
from megatron_slm.selection import noise
from megatron_slm.selection.selector import Selector
from megatron_slm.types import DenseDistribution, MicroBatch, SparseDistribution, positions_of

logger = logging.getLogger(__name__)


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
    num_samples = sum(len(manifest.samples_of(shard)) for shard in missing)
    length, num_pipelines = plan.config.data.seq_length, plan.topology.data
    with show_progress("scoring", num_samples * length, "tokens", shown=dist.get_rank() == 0) as progress:
        scorer = _Scorer(plan, progress)
        for first in range(0, len(missing), num_pipelines):
            shards = missing[first : first + num_pipelines]
            mine = shards[scorer.rank.data] if scorer.rank.data < len(shards) else None
            done = progress.done
            scores = scorer.score(manifest, mine)
            written: dict[str, dict[str, Any]] = {}
            with raise_on_all_ranks():
                if mine is not None and scores is not None:
                    written[shard_name(mine)] = write_shard(plan.output, manifest, mine, *scores)
            manifest = _commit(plan, manifest, written)
            progress.update(done + length * sum(len(manifest.samples_of(shard)) for shard in shards))
    logger.info("scored %s of %s samples", f"{num_samples:,}", f"{num_samples:,}")
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

    def __init__(self, plan: ScoringPlan, progress: Progress) -> None:
        parallel = plan.config.parallel
        self.rank = plan.topology.coordinate(dist.get_rank())
        self.is_first, self.is_last = self.rank.pipeline == 0, self.rank.pipeline == plan.topology.pipeline - 1
        tp = create_tensor_parallel_group(
            plan.topology,
            sequence_parallel=parallel.sequence_parallel,
            num_query_groups=[plan.reference.architecture.num_query_groups],
        )
        divisible = plan.config.model.make_vocab_size_divisible_by
        self.context = create_context_parallel_group(plan.topology)
        layers = ParallelLayers(tp, context=self.context, vocabulary_divisible_by=divisible, backends=plan.backends)
        head = LossHead(backend=plan.config.loss_head.loss_head_backend)
        self.objective = Objective(selector=Selector(), tp=tp, context=self.context, head=head)
        self.with_entropy, self.distribution = plan.options.with_entropy, plan.distribution
        self.num_ids, self.seed = plan.tokenizer.vocab_size, plan.config.training.seed
        model = plan.reference
        self.reference = build_reference(model.architecture, model.source, plan.topology, layers, plan.dtype)
        self.device, self.dtype = local_device(), plan.dtype
        self.channels = Channels(plan.topology, dist.get_rank(), self.device, [Lane.REFERENCE], Activity())
        self.b = plan.config.training.micro_batch_size
        length = plan.reference_length // self.context.size // (tp.size if tp.sequence_parallel else 1)
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
        self.progress = progress
        # as if all pipelines were as far as this one
        self.tokens_per_micro_batch = self.b * plan.config.data.seq_length * plan.topology.data

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
        if not samples or not self.is_last or self.objective.tp.rank != 0 or self.context.rank != 0:
            return None
        if self.retokenized is not None:
            batches = [self.run_source.micro_batch(start, 0) for start in samples[:: self.b]]
            parts = [[self._spread(part[0], batch), None] for part, batch in zip(parts, batches, strict=True)]
        digests = [digest for batch in batches for digest in token_digests(batch)][: len(samples)]
        scores = [
            None if column[0] is None else torch.cat(column)[: len(samples)] for column in zip(*parts, strict=True)
        ]
        probabilities = None if self.distribution is None else Probabilities(*scores[2:])  # type: ignore[arg-type]
        return Scores(scores[0], scores[1], probabilities), digests  # type: ignore[arg-type]

    def _spread(self, loss_bL: Tensor | None, batch: MicroBatch) -> Tensor:
        """Spread the reference's losses over the run's tokens, [b, s]; 0 where the run has no label."""
        assert self.retokenized is not None, "the reference has another tokenizer"
        assert loss_bL is not None, "the last stage has the losses"
        rows = torch.zeros(batch.labels_bs.shape)
        for row, loss_L, sample in zip(rows, loss_bL.float().cpu().numpy(), batch.sample_b.tolist(), strict=True):
            if sample < len(self.retokenized):
                row.copy_(torch.from_numpy(self.retokenized.spread(sample, loss_L)))
        return rows.masked_fill_(~batch.valid_bs, 0.0)

    def _forward(self, num_micro_batches: int, batches: Sequence[MicroBatch]) -> list[list[Tensor | None]]:
        """Run all micro-batches through this stage; on the last one return what is stored of each, by sample."""
        previous, following = self.channels.previous.get(Lane.REFERENCE), self.channels.next.get(Lane.REFERENCE)
        parts = []
        self._post_receive(previous, posted=0, of=num_micro_batches)
        for i in range(num_micro_batches):
            self._post_receive(previous, posted=i + 1, of=num_micro_batches)  # one ahead of need
            read = cut_batch(batches[i], self.context).to(self.device) if batches else None
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
                parts.append(self._scores(x, read))
            self.progress.advance(self.tokens_per_micro_batch)
        self.channels.flush()
        return parts

    def _scores(self, x_sbd: Tensor, batch: MicroBatch) -> list[Tensor | None]:
        """Compute a micro-batch's losses, entropies (or None) and probabilities, each [b, s, ...] on the CPU.

        Collective over the ranks that share its sequences.
        """
        found = self._scores_held(x_sbd, batch)
        return [None if x is None else gather_samples(x, self.context, self.device) for x in found]

    def _scores_held(self, x_sbd: Tensor, batch: MicroBatch) -> list[Tensor | None]:
        """Compute those of the positions held here."""
        output, stored = self.reference.output_weight(), self.distribution
        statistics = self.objective.statistics(
            x_sbd, output, batch, with_entropy=self.with_entropy, with_distribution=stored is not None
        )
        scores = [None if x_N is None else x_N.view_as(batch.valid_bs).cpu() for x_N in statistics[:2]]
        if stored is None:
            return scores
        hidden = statistics.distribution
        assert isinstance(hidden, DenseDistribution), "an objective keeps what was asked for"
        rows = RowStatistics(hidden.max_N, hidden.sum_N, torch.zeros_like(hidden.max_N), None)
        inputs = loss_rows(x_sbd, self.objective.tp), output.weight_Vd, rows, output.part(self.objective.tp)
        if stored.kind == "top":
            distribution = most_probable(*inputs, count=stored.count, limit=self.num_ids)
        else:
            sample_N = batch.sample_b[:, None].expand_as(batch.labels_bs).flatten()
            position_N = positions_of(batch).repeat(len(batch.sample_b))
            uniform_N = noise.uniform(self.seed, noise.STORED_SAMPLE, sample_N, position_N)
            id_Nk = sampled(*inputs, uniform_N, count=stored.count, limit=self.num_ids)
            distribution = SparseDistribution(id_Nk, torch.zeros(0))
        return [*scores, *Probabilities.of(distribution, stored, batch.valid_bs.shape)]

    def _post_receive(self, channel: Channel | None, *, posted: int, of: int) -> None:
        if channel is not None and posted < of:
            channel.post_receive(self.message_shape, self.dtype, self.device)
