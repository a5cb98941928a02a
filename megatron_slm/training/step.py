"""One training step, whichever engine runs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_slm.loss.objective import LossSums, Probed, StepSettings
from megatron_slm.parallel.topology import Topology
from megatron_slm.pipeline.activity import Activity
from megatron_slm.pipeline.engine import BatchSource, SelectiveEngine
from megatron_slm.pipeline.facts import MicroBatchFacts, StepFacts
from megatron_slm.pipeline.gradients import gradients_scaled, step_factor, sum_over_world
from megatron_slm.pipeline.refusal import Reason, refusal
from megatron_slm.pipeline.schedule import Kind
from megatron_slm.pipeline.search import choose_schedule
from megatron_slm.pipeline.simulate import describe
from megatron_slm.pipeline.timers import Timers
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import MicroBatch, TokenStatistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did."""

    sums: LossSums
    """Over all micro-batches and ranks."""
    grad_norm: float
    """Global gradient norm before clipping; infinity where the step was skipped."""
    refused: Reason | None
    """Why nothing was updated; None where the step was applied."""
    seconds: float

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated."""
        return self.refused is not None


class Trainer(Protocol):
    """The two engines' common face."""

    engine: Any
    timers: Timers
    activity: Activity
    """What this rank is doing; the watchdog's source."""

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """Forward, backward and optimizer step; the sums over all ranks.

        Args:
            is_last: no step follows; nothing of a next one is read.
        """
        ...

    def micro_batch_facts(self) -> list[MicroBatchFacts]:
        """What the last step saw of each micro-batch on this rank."""
        ...

    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Losses of held-out micro-batches; the sums over all ranks."""
        ...

    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """What the reference, if there is one, says of micro-batches outside of training; on the last stage."""
        ...

    def probe(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[Probed]:
        """What is said of the tokens of micro-batches, without a gradient; on the last stage.

        Args:
            settings: None selects nothing.
        """
        ...


class PipelineTrainer:
    """ZeRO-1 at any number of stages.

    With measured steps, the first ones are run by a schedule whose costs were counted, and timed; then the
    schedule is chosen again for what they took.
    """

    def __init__(self, engine: SelectiveEngine, *, num_measured_steps: int = 0) -> None:
        self.engine, self._left_to_measure = engine, num_measured_steps
        self.activity = engine.context.activity
        self.evaluate = engine.evaluate
        self.micro_batch_facts = engine.micro_batch_facts
        self.timers = engine.context.timers
        self.reference_statistics = engine.reference_statistics
        self.probe = engine.probe
        if num_measured_steps:
            engine.start_measuring()

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """See `Trainer`."""
        refits = self._left_to_measure == 1
        sums = self.engine.train_step(source, settings, is_last=is_last or refits)
        self._left_to_measure -= self._left_to_measure > 0
        if refits:
            before = self.engine.schedule
            schedule = choose_schedule(before.mode, self.engine.measured_costs(), before.num_micro_batches)
            logger.info("%s", describe(schedule, "measured", self.engine.context.sizes))
            self.engine.adopt(schedule)
        return sums


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
    ) -> None:
        self.timers = timers
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
            with timing("forward-compute"):
                loss_sum, values = self.engine(batch, reference, settings, watch=self._facts.watch(i))
            activity.at(2 * i + 1, 2 * count + 1, Kind.BACKWARD.value, i)
            with timing("backward-compute"):
                self.engine.backward(loss_sum, scale_wrt_gas=False)
            if self.objective.tp.rank == 0:  # every tensor rank has the same; one of them is counted
                self._facts.add(i, values)
        activity.at(2 * count, 2 * count + 1, Kind.OPTIMIZER_STEP.value, -1)
        sums = sum_over_world(self._facts.in_order, self.engine.device, num_sources=self.objective.num_sources)
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
    )
