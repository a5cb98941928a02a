"""Training without a pipeline: ZeRO-2 and ZeRO-3 on DeepSpeed's plain engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.engine.facts import MicroBatchFacts, StepFacts
from megatron_slm.engine.gradients import gradients_scaled, step_factor, sum_over_world
from megatron_slm.engine.module import Watch, output_rows, run_layer, watched
from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.schedule.programs import Kind
from megatron_slm.engine.timers import Timers
from megatron_slm.engine.trainer import BatchSource
from megatron_slm.loss.objective import Objective, Probed, StepSettings
from megatron_slm.loss.sums import LossSums, evaluation_sums
from megatron_slm.model.llama import layer_list
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import MicroBatch, TokenStatistics


class FlatTrainer:
    """ZeRO-2 and ZeRO-3: one stage, DeepSpeed's plain engine around a `FlatModule`."""

    def __init__(
        self,
        engine: Any,
        topology: Topology,
        reference: FrozenStage | None,
        num_micro_batches: int,
        scores: StoredScores | None,
        timers: Timers,
        rows: RowSampler | None = None,
    ) -> None:
        self.timers, self.rows = timers, rows
        self.engine, self.topology, self.reference, self.scores = engine, topology, reference, scores
        self.num_micro_batches = num_micro_batches
        self.activity = Activity()
        self.objective = engine.module.objective

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """See `Trainer`. The reference rides along, so there is no work for a next step."""
        self.engine.train()
        self._facts, timing, activity, count = StepFacts(), self.timers.timing, self.activity, self.num_micro_batches
        for i in range(count):
            activity.at(2 * i, 2 * count + 1, Kind.FORWARD.value, i)
            with timing("batch-generator"):
                read = source(i)
            batch = self._on_device(read)
            with timing("reference-forward-compute"):
                reference = self._reference_statistics(read, batch)
            self.engine.set_gradient_accumulation_boundary(i == count - 1)
            rows = None if self.rows is None else self.rows.of_micro_batch(i, settings)
            with timing("forward-compute"):
                loss_sum, values = self.engine(batch, reference, settings, watch=self._facts.watch(i), rows=rows)
            activity.at(2 * i + 1, 2 * count + 1, Kind.BACKWARD.value, i)
            with timing("backward-compute"):
                self.engine.backward(loss_sum, scale_wrt_gas=False)
            if self.objective.tp.rank == 0:  # every tensor rank has the same; one of them is counted
                self._facts.add(i, values)
        activity.at(2 * count, 2 * count + 1, Kind.OPTIMIZER_STEP.value, -1)
        vectors, num_sources = self._facts.in_order, self.objective.num_sources
        sums = sum_over_world(vectors, self.engine.device, num_sources=num_sources, rows=self.rows)
        with (
            timing("optimizer"),
            gradients_scaled(self.engine.optimizer, step_factor(sums, settings, self.topology.data)),
        ):
            self.engine.step()
        return sums

    def micro_batch_facts(self) -> list[MicroBatchFacts]:
        """See `Trainer`."""
        return self._facts.read()

    @torch.no_grad()
    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """See `Trainer`."""
        self.engine.eval()
        with self.timers.paused():
            values = [self.engine(self._on_device(source(i)), None, None)[1] for i in range(num_micro_batches)]
        return sum_over_world(values if self.objective.tp.rank == 0 else [], self.engine.device)

    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """See `Trainer`."""
        batches = [source(i) for i in range(num_micro_batches)]
        return [self._reference_statistics(batch, self._on_device(batch)) for batch in batches]

    @torch.no_grad()
    def probe(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[Probed]:
        """See `Trainer`."""
        self.engine.eval()
        batches = (self._on_device(source(i)) for i in range(len(references)))
        return [self.engine(b, x, settings, probing=True)[0] for b, x in zip(batches, references, strict=True)]

    def _reference_statistics(self, read: MicroBatch, batch: MicroBatch) -> TokenStatistics | None:
        if self.scores is not None:
            return self.scores(read).to(self.engine.device)
        if self.reference is None:
            return None
        return self.reference.statistics(self.reference(batch.tokens_bs, batch.documents), self.objective, batch)

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        return batch.to(self.engine.device)


class FlatModule(nn.Module):
    """The whole decoder with its loss, for the engine that has no pipeline (ZeRO-2 and ZeRO-3).

    The loss is inside, because ZeRO-3 brings a layer's weights together only while the module runs.
    """

    def __init__(
        self, arch: Architecture, layers: ParallelLayers, objective: Objective, *, recompute: bool, timers: Timers
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(maker.make() for maker in layer_list(arch, layers))
        self.objective, self.recompute = objective, recompute
        self.timers = timers

    def forward(
        self,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings | None,
        *,
        probing: bool = False,
        watch: Watch | None = None,
        rows: BackwardRows | None = None,
    ) -> tuple[Tensor | Probed, Tensor]:
        """The loss sum (nats) and the values of its `LossSums`, fp64.

        Args:
            settings: the training step's; None evaluates, over all valid tokens and without a gradient.
            probing: only look; instead of the loss comes what is said of each token.
            watch: sees the gradient of the embedding's output, in the backward pass.
            rows: choice of the rows that the blocks' backward passes run on; None for all.
        """
        embedding, *_, head = self.layers
        x_sbd = batch.tokens_bs
        for layer in self.layers:
            x_sbd = run_layer(layer, x_sbd, batch.documents, rows, recomputes=self.recompute and self.training)
            x_sbd, watch = watched(x_sbd, watch)
        weight = output_rows(head.output or embedding.embed_tokens)  # type: ignore[arg-type]
        if probing:
            probed = self.objective.probe(x_sbd, weight, batch, reference, settings)
            return probed, x_sbd.new_empty(0, dtype=torch.float64)
        with self.timers.timing("loss-head"):
            if settings is not None:
                return self.objective.loss(x_sbd, weight, batch, reference, settings)
            sums = evaluation_sums(self.objective.statistics(x_sbd, weight, batch), batch)
        return sums[0], sums
