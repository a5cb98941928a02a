"""Training without a pipeline: ZeRO-2 and ZeRO-3 on DeepSpeed's plain engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.recomputation import KEEP_ALL, Recomputation
from megatron_slm.engine.diagnostics import MicroBatchDiagnostics, StepDiagnostics
from megatron_slm.engine.gradients import gradient_factor, limited_norm, scaled_gradients, sum_over_world
from megatron_slm.engine.module import GradientHook, output_rows, run_layers
from megatron_slm.engine.offload import saved_activations
from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.schedule.programs import Kind
from megatron_slm.engine.timers import Timers
from megatron_slm.engine.trainer import BatchSource
from megatron_slm.loss.objective import Objective, OutputWeight, ScoredTokens, StepSettings
from megatron_slm.loss.sums import EVALUATION, LossSums
from megatron_slm.model.llama import layer_list
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.context import cut_batch, cut_statistics
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.pair import ReferencePair
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import MicroBatch, TokenStatistics

T = TypeVar("T")


class FlatTrainer:
    """A `Trainer` of one stage: DeepSpeed's plain engine around a `FlatModule`. The reference rides along."""

    def __init__(
        self,
        engine: Any,
        topology: Topology,
        objective: Objective,
        *,
        reference: FrozenStage | ReferencePair | None,
        scores: StoredScores | None,
        num_micro_batches: int,
        timers: Timers,
        rows: RowSampler | None = None,
    ) -> None:
        self.engine, self.topology, self.objective = engine, topology, objective
        self.reference, self.scores, self.rows = reference, scores, rows
        self.num_micro_batches = num_micro_batches
        self.step_timers, self.activity = timers, Activity()
        self.exceeding_norm: float | None = None

    def use_micro_batches(self, count: int) -> None:
        """Give the steps from the next one on so many micro-batches."""
        self.num_micro_batches = count

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """Run forward, backward and optimizer step; return the sums over all ranks. Nothing is done ahead."""
        self.engine.train()
        self._diagnostics = StepDiagnostics()
        timing, count = self.step_timers.timing, self.num_micro_batches
        for i in range(count):
            self._enter(2 * i, Kind.FORWARD, i)
            with timing("batch-generator"):
                read = source(i)
            batch = self._on_device(read)
            with timing("reference-forward-compute"):
                reference = self._reference_statistics(read, batch)
            self.engine.set_gradient_accumulation_boundary(i == count - 1)
            head = partial(self._loss, batch, reference, settings)
            rows = None if self.rows is None else self.rows.of_micro_batch(i, settings)
            with timing("forward-compute"):
                loss_sum, sums = self.engine(batch, head, self._diagnostics.gradient_hook(i), rows)
            self._enter(2 * i + 1, Kind.BACKWARD, i)
            with timing("backward-compute"):
                self.engine.backward(loss_sum, scale_wrt_gas=False)
            if self.objective.tp.rank == 0:  # every tensor-parallel rank has the same; one of them is counted
                self._diagnostics.add_sums(i, sums)
        self._enter(2 * count, Kind.OPTIMIZER_STEP)
        vectors, layout = self._diagnostics.sums_in_order, self.objective.sum_layout
        total = sum_over_world(vectors, layout, self.engine.device, rows=self.rows)
        factor = gradient_factor(total, settings, self.topology.copies)
        optimizer, limit = self.engine.optimizer, settings.norm_limit
        with timing("optimizer"), scaled_gradients(optimizer, factor), limited_norm(optimizer, limit) as norm:
            self.engine.step()
        self.exceeding_norm = norm.exceeding
        return total

    def micro_batch_diagnostics(self) -> list[MicroBatchDiagnostics]:
        """Read the diagnostics of the last step's micro-batches on this rank."""
        return self._diagnostics.read(self.objective.sum_layout)

    @torch.no_grad()
    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Compute the losses of held-out micro-batches; return the sums over all ranks."""
        self.engine.eval()
        vectors = []
        for i in range(num_micro_batches):
            batch = self._on_device(source(i))
            vectors.append(self.engine(batch, partial(self.objective.evaluation_sums, batch=batch)))
        counted = vectors if self.objective.tp.rank == 0 else []
        return sum_over_world(counted, EVALUATION, self.engine.device)

    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """Run the reference, if there is one, on micro-batches outside of training."""
        batches = [source(i) for i in range(num_micro_batches)]
        return [self._reference_statistics(batch, self._on_device(batch), trains=False) for batch in batches]

    @torch.no_grad()
    def scored_tokens(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[ScoredTokens]:
        """Compute losses, scores and selection of micro-batches without a gradient.

        Args:
            references: the reference's statistics of each micro-batch.
            settings: None computes the losses alone.
        """
        self.engine.eval()
        scored = []
        for i, reference in enumerate(references):
            batch = self._on_device(source(i))
            head = partial(self.objective.scored_tokens, batch=batch, reference=reference, settings=settings)
            scored.append(self.engine(batch, head))
        return scored

    def _loss(
        self,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
        x_sbd: Tensor,
        weight: OutputWeight,
    ) -> tuple[Tensor, Tensor]:
        with self.step_timers.timing("loss-head"):
            return self.objective.loss(x_sbd, weight, batch, reference, settings)

    def _reference_statistics(
        self, read: MicroBatch, batch: MicroBatch, *, trains: bool = True
    ) -> TokenStatistics | None:
        if self.scores is not None:
            with_distribution = trains and self.objective.distillation is not None
            stored = self.scores(read, with_distribution=with_distribution)
            return cut_statistics(stored, read, self.objective.context).to(self.engine.device)
        if self.reference is None:
            return None
        x_sbd = self.reference(batch.tokens_bs, batch.documents)
        return self.reference.statistics(x_sbd, self.objective, batch, trains=trains)

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        return cut_batch(batch, self.objective.context).to(self.engine.device)

    def _enter(self, number: int, kind: Kind, micro_batch: int = -1) -> None:
        """Record the part of the step that starts: a forward and a backward a micro-batch, then the optimizer."""
        self.activity.at(number, 2 * self.num_micro_batches + 1, kind.value, micro_batch)


class FlatModule(nn.Module):
    """The whole decoder, for the engine that has no pipeline (ZeRO-2 and ZeRO-3).

    What is computed from the last hidden states is called inside, because ZeRO-3 gathers a layer's weights only while
    the module runs.
    """

    def __init__(
        self, arch: Architecture, layers: ParallelLayers, *, recomputation: Recomputation, offloads: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(maker.make() for maker in layer_list(arch, layers))
        self.recomputation, self.offloads = recomputation, offloads

    def forward(
        self,
        batch: MicroBatch,
        head: Callable[[Tensor, OutputWeight], T],
        hook: GradientHook | None = None,
        rows: BackwardRows | None = None,
    ) -> T:
        """Return what `head` makes of the last hidden states [s, b, d] and the output weight.

        Args:
            hook: is called with the gradient of the embedding's output, in the backward pass.
            rows: choice of the rows that the blocks' backward passes run on; None for all.
        """
        rule = self.recomputation if self.training else KEEP_ALL
        tokens_bs, documents = batch.tokens_bs, batch.documents
        with saved_activations(self, offloads=self.offloads):
            x_sbd = run_layers(self.layers, tokens_bs, documents, recomputation=rule, hook=hook, rows=rows)
        embedding, *_, last = self.layers
        return head(x_sbd, output_rows(last, last.output or embedding.embed_tokens))  # type: ignore[arg-type]
