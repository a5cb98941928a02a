"""DeepSpeed's pipeline engine, running our schedules: the model, the reference beside it, and the selection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.profiler import record_function

from megatron_slm.engine.context import StageContext
from megatron_slm.engine.diagnostics import MicroBatchDiagnostics, StepDiagnostics
from megatron_slm.engine.gradients import (
    accumulate_in_place,
    gradient_factor,
    limited_norm,
    scaled_gradients,
    sum_over_world,
)
from megatron_slm.engine.lookahead import Lookahead
from megatron_slm.engine.measure import TIMER_OF, measured_costs
from megatron_slm.engine.module import StageModule
from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.schedule.costs import Work
from megatron_slm.engine.schedule.programs import Instruction, Kind, Programs, Schedule, forward_programs
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import describe
from megatron_slm.engine.timers import Timers
from megatron_slm.engine.trainer import BatchSource
from megatron_slm.loss.objective import ScoredTokens, StepSettings
from megatron_slm.loss.sums import EVALUATION, LossSums
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.channels import Channel, Channels, Lane
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.context import cut_batch, cut_statistics
from megatron_slm.parallel.groups import ContextParallel
from megatron_slm.types import Documents, TokenStatistics

logger = logging.getLogger(__name__)

Head = Callable[[int, Tensor], Any]
"""Work of the last stage on a micro-batch, by its number and the model's last hidden states [s, b, d]."""


class SelectiveEngine(PipelineEngine):
    """A `PipelineEngine` whose step is a static program of instructions, one list per stage: a `Trainer` for ZeRO-1.

    DeepSpeed keeps what it is good at (ZeRO-1, tied weights, clipping, precision); the order of work, the
    messages and the loss are ours. Its own engine dispatches schedule instructions through a class-level map
    of plain functions by exact type, so the map here is ours too.
    """

    def attach(self, context: StageContext) -> None:
        """Give the engine its reference, objective and channels. Collective over the world.

        The context is a plain object, so the reference in it does not become a submodule of the engine.
        """
        self.context = context
        if self.using_bf16_optimizer:
            accumulate_in_place(self.optimizer)
        lanes = [lane for lane in Lane if lane is not Lane.REFERENCE or context.reference is not None]
        self._channels = Channels(context.topology, self.global_rank, self.device, lanes, context.activity)
        self._lookahead = Lookahead()
        self.schedule, self._works_ahead = context.schedule, False
        self.exceeding_norm: float | None = None
        self._steps_to_measure = context.num_measured_steps
        if self._steps_to_measure:
            context.timers.keep_intervals()
        self._outgoing: dict[tuple[Lane, int], Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self.pipe_buffers: dict[str, dict[int, Any]] = {
            name: {} for name in ("inputs", "outputs", "output_tensors", "labels")
        }

    def _broadcast_model(self) -> None:
        """Leave out DeepSpeed's broadcast: weights are zero on all ranks until `fill_optimizer` reads them."""

    @property
    def engine(self) -> SelectiveEngine:
        """DeepSpeed's engine: this object itself."""
        return self

    @property
    def step_timers(self) -> Timers:
        """Timers of the training steps; `timers` are DeepSpeed's own."""
        return self.context.timers

    @property
    def rows(self) -> RowSampler | None:
        """Chooser of the rows of the backward passes; None where they run on all."""
        return self.context.rows

    @property
    def _ranks(self) -> ContextParallel:
        """The ranks that share every sequence."""
        return self.context.objective.context

    @property
    def activity(self) -> Activity:
        """Current activity of this rank, for the watchdog."""
        return self.context.activity

    # ---- steps ------------------------------------------------------------------------------------------

    def use_micro_batches(self, count: int) -> None:
        """Give the steps from the next one on so many micro-batches, in a schedule of the same mode and costs."""
        if count != self.schedule.num_micro_batches:
            self.adopt(choose_schedule(self.schedule.mode, self.schedule.costs, count))

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """Run one optimizer step on the schedule's micro-batches; return its sums over all ranks.

        Args:
            is_last: no step follows: none of its micro-batches is read, and no reference work is done for it.
        """
        self.module.train()
        self._settings = settings
        is_last_measured = self._steps_to_measure == 1
        if not self._works_ahead:  # the first step of this process, or of a schedule
            self._run(self.schedule.prologue, source)
        self._works_ahead = not (is_last or is_last_measured)
        self._run(self.schedule.step if self._works_ahead else self.schedule.last, source, self._loss)
        self._lookahead.advance(self.schedule.num_micro_batches)
        if self._steps_to_measure:
            self._steps_to_measure -= 1
        if is_last_measured:
            self._fit_schedule()
        return self._sums

    def _fit_schedule(self) -> None:
        """Choose the schedule again, for the costs that the steps so far had. Collective over the world."""
        costs = measured_costs(self.step_timers.take_intervals(), self.context.topology, self.device)
        schedule = choose_schedule(self.schedule.mode, costs, self.schedule.num_micro_batches)
        logger.info("%s", describe(schedule, "measured", self.context.sizes))
        self.adopt(schedule)

    def adopt(self, schedule: Schedule) -> None:
        """Continue with another schedule; the step before was run as a last one, so that no work is done ahead."""
        assert not self._works_ahead, "work done ahead belongs to the schedule that did it"
        self.schedule = schedule

    def micro_batch_diagnostics(self) -> list[MicroBatchDiagnostics]:
        """Read the diagnostics of the last step's micro-batches on this rank."""
        return self._diagnostics.read(self.context.objective.sum_layout)

    # ---- beside training --------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Compute the losses of held-out micro-batches, without reference or gradient; return sums over all ranks.

        Work that training has done ahead stays as it is, results and messages alike.
        """
        self.module.eval()
        with self._beside_training():
            self._run(forward_programs(Work.FORWARD, self.num_stages, num_micro_batches), source, self._evaluate)
        return sum_over_world(self._diagnostics.sums_in_order, EVALUATION, self.device)

    @torch.no_grad()
    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """Run the reference on micro-batches outside of training; results are on the last stage.

        Before the first step, or where nothing is done ahead: its messages travel on the reference's lane.
        """
        scores = self.context.scores
        if scores is not None and self.is_last_stage():
            read = [source(i) for i in range(num_micro_batches)]
            return [cut_statistics(scores(batch), batch, self._ranks).to(self.device) for batch in read]
        if self.context.reference is None:
            return [None] * num_micro_batches
        assert not self._works_ahead, "messages of work done ahead are on their way"
        with self._beside_training():
            self._run(forward_programs(Work.REFERENCE, self.num_stages, num_micro_batches), source)
            return [self._lookahead.take_reference(i) for i in range(num_micro_batches)]

    @torch.no_grad()
    def scored_tokens(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[ScoredTokens]:
        """Compute losses, scores and selection of micro-batches without a gradient; results are on the last stage.

        Args:
            references: the reference's statistics of each micro-batch.
            settings: None computes the losses alone.
        """
        self.module.eval()
        head = partial(self._score, references, settings)
        with self._beside_training():
            return self._run(forward_programs(Work.FORWARD, self.num_stages, len(references)), source, head)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Number micro-batches anew inside, and put back afterwards what training has done ahead."""
        ahead, self._lookahead = self._lookahead, Lookahead(trains=False)
        try:
            with self.step_timers.paused():
                yield
        finally:
            self._lookahead = ahead

    # ---- programs ---------------------------------------------------------------------------------------

    def _run(self, programs: Programs, source: BatchSource, head: Head | None = None) -> list[Any]:
        """Run this stage's program; return what `head` returned, by micro-batch (on the last stage)."""
        self._source, self._head, self._diagnostics = source, head, StepDiagnostics()
        self._results: dict[int, Any] = {}
        self._execute(programs[self.stage_id])
        with self.step_timers.timing("send"):
            self._channels.flush()
        return [self._results[i] for i in sorted(self._results)]

    def _execute(self, program: Sequence[Instruction]) -> None:
        length = len(program)
        for index, (kind, micro_batch) in enumerate(program):
            self.activity.at(index, length, kind.value, micro_batch)
            which = f" of micro-batch {micro_batch}" if micro_batch >= 0 else ""
            doing = f"stage {self.stage_id}, {kind.value}{which}"
            with translate_peer_errors(doing), record_function(f"slm::{kind.value}"):
                self._HANDLERS[kind](self, micro_batch)

    def _timing(self, work: Work) -> AbstractContextManager[None]:
        self._channels.before_computation()
        return self.step_timers.timing(TIMER_OF[work])

    def _receive(self, channel: Channel) -> Tensor:
        with self.step_timers.timing(f"{channel.lane.value}-recv"):
            return channel.receive()

    # ---- the model --------------------------------------------------------------------------------------

    def _load(self, i: int) -> None:
        if i in self._lookahead:
            return
        with self.step_timers.timing("batch-generator"):
            read = self._source(i)
        self._lookahead.add(i, cut_batch(read, self._ranks).to(self.device))
        scores = self.context.scores
        if scores is not None and self.is_last_stage() and torch.is_grad_enabled():
            distills = self.context.objective.distillation is not None
            stored = cut_statistics(scores(read, with_distribution=distills), read, self._ranks)
            self._lookahead.add_reference(i, stored.to(self.device))

    def _documents(self, i: int) -> Documents | None:
        """The documents of a micro-batch, which stages between the first and the last read for these alone."""
        if not self.context.keeps_documents_apart:
            return None
        self._load(i)
        return self._lookahead.batch(i).documents

    def _forward(self, i: int) -> None:
        trains = torch.is_grad_enabled()
        if self.is_first_stage():
            x = self._lookahead.batch(i).tokens_bs
        else:
            x = self._receive(self._channels.previous[Lane.FORWARD]).requires_grad_(trains)
        documents = self._documents(i)
        with self._timing(Work.FORWARD):
            hook = self._diagnostics.gradient_hook(i) if self.is_first_stage() and trains else None
            rows = self.rows.of_micro_batch(i, self._settings) if trains and self.rows is not None else None
            out = DeepSpeedEngine.forward(self, x, documents, hook, rows)
            if trains:
                self.pipe_buffers["inputs"][i], self.pipe_buffers["outputs"][i] = x, out
            if not self.is_last_stage():
                self._outgoing[Lane.FORWARD, i] = out
            elif self._head is not None:
                self._results[i] = self._head(i, out)
        self._lookahead.remove(i)

    def _loss(self, i: int, x_sbd: Tensor) -> None:
        """The head of a training step: the loss that `_backward` starts from."""
        batch, reference = self._lookahead.batch(i), self._lookahead.take_reference(i)
        with self.step_timers.timing("loss-head"):
            weight, settings = self.module.output_weight(), self._settings
            self._losses[i], sums = self.context.objective.loss(x_sbd, weight, batch, reference, settings)
        self._count(i, sums)

    def _evaluate(self, i: int, x_sbd: Tensor) -> None:
        batch, weight = self._lookahead.batch(i), self.module.output_weight()
        self._count(i, self.context.objective.evaluation_sums(x_sbd, weight, batch))

    def _score(
        self,
        references: Sequence[TokenStatistics | None],
        settings: StepSettings | None,
        i: int,
        x_sbd: Tensor,
    ) -> ScoredTokens:
        batch, weight = self._lookahead.batch(i), self.module.output_weight()
        return self.context.objective.scored_tokens(x_sbd, weight, batch, references[i], settings)

    def _count(self, i: int, sums: Tensor) -> None:
        if self.context.objective.tp.rank == 0:  # every tensor-parallel rank has the same; one of them is counted
            self._diagnostics.add_sums(i, sums)

    def _backward(self, i: int) -> None:
        if self.is_last_stage():
            with self._timing(Work.BACKWARD):
                DeepSpeedEngine.backward(self, self._losses.pop(i), scale_wrt_gas=False)
        else:
            self.grad_layer = self._receive(self._channels.next[Lane.BACKWARD])
            with self._timing(Work.BACKWARD):
                PipelineEngine._exec_backward_pass(self, i)
            del self.pipe_buffers["output_tensors"][i]
        del self.pipe_buffers["outputs"][i]
        x = self.pipe_buffers["inputs"].pop(i)
        if not self.is_first_stage():
            self._outgoing[Lane.BACKWARD, i] = x.grad
            self._diagnostics.add_gradient(i, x.grad)

    # ---- the reference ----------------------------------------------------------------------------------

    def _reference(self, i: int) -> None:
        # called directly, not through the engine's forward: that would touch ZeRO's hooks and counters
        reference = self.context.reference
        assert reference is not None, "a schedule with reference instructions needs a reference"
        if self.is_first_stage():
            x = self._lookahead.batch(i).tokens_bs
        else:
            x = self._receive(self._channels.previous[Lane.REFERENCE])
        documents = self._documents(i)
        with self._timing(Work.REFERENCE):
            out = reference(x, documents)
            if self.is_last_stage():
                batch, trains = self._lookahead.batch(i), self._lookahead.trains
                statistics = reference.statistics(out, self.context.objective, batch, trains=trains)
                self._lookahead.add_reference(i, statistics)
            else:
                self._outgoing[Lane.REFERENCE, i] = out

    # ---- messages ---------------------------------------------------------------------------------------

    def _send(self, lane: Lane, i: int) -> None:
        channels = self._channels.previous if lane is Lane.BACKWARD else self._channels.next
        with self.step_timers.timing("send"):
            channels[lane].send(self._outgoing.pop((lane, i)))

    def _post_receive(self, lane: Lane) -> None:
        context = self.context
        channel: Channel = (self._channels.next if lane is Lane.BACKWARD else self._channels.previous)[lane]
        shape = context.message_shape
        if lane is Lane.REFERENCE:
            assert context.reference is not None, "reference messages need a reference"
            shape = (*shape[:2], context.reference.message_width)
        channel.post_receive(shape, context.dtype, self.device)

    # ---- the end of a step ------------------------------------------------------------------------------

    def _reduce_gradients(self, _: int) -> None:
        with self.step_timers.timing("all-grads-sync"):
            PipelineEngine._exec_reduce_grads(self)

    def _optimizer_step(self, _: int) -> None:
        """Divide once, by the kept tokens of the whole batch, then step; or skip the step, as its losses ask."""
        vectors, layout = self._diagnostics.sums_in_order, self.context.objective.sum_layout
        self._sums = sum_over_world(vectors, layout, self.device, rows=self.rows)
        factor = gradient_factor(self._sums, self._settings, self.context.topology.copies)
        limit = self._settings.norm_limit
        with (
            self.step_timers.timing("optimizer"),
            scaled_gradients(self.optimizer, factor),
            limited_norm(self.optimizer, limit) as norm,
        ):
            PipelineEngine._exec_optimizer_step(self)
        self.exceeding_norm = norm.exceeding

    _HANDLERS: ClassVar[dict[Kind, Callable[[Any, int], None]]] = {
        Kind.LOAD_MICRO_BATCH: _load,
        Kind.LOAD_REFERENCE_MICRO_BATCH: _load,
        Kind.FORWARD: _forward,
        Kind.BACKWARD: _backward,
        Kind.REFERENCE_FORWARD: _reference,
        Kind.SEND_ACTIVATION: lambda self, i: self._send(Lane.FORWARD, i),
        Kind.SEND_GRADIENT: lambda self, i: self._send(Lane.BACKWARD, i),
        Kind.SEND_REFERENCE_ACTIVATION: lambda self, i: self._send(Lane.REFERENCE, i),
        Kind.RECV_ACTIVATION: lambda self, i: self._post_receive(Lane.FORWARD),
        Kind.RECV_GRADIENT: lambda self, i: self._post_receive(Lane.BACKWARD),
        Kind.RECV_REFERENCE_ACTIVATION: lambda self, i: self._post_receive(Lane.REFERENCE),
        Kind.REDUCE_TIED_GRADIENTS: lambda self, _: PipelineEngine._exec_reduce_tied_grads(self),
        Kind.REDUCE_GRADIENTS: _reduce_gradients,
        Kind.OPTIMIZER_STEP: _optimizer_step,
    }


def pipeline_engine(
    module: StageModule, optimizer: torch.optim.Optimizer, config: dict[str, Any], context: StageContext
) -> SelectiveEngine:
    """Build the engine as `deepspeed.initialize` would, which picks the engine's class by a fixed test.

    Collective over the world.
    """
    mpu = module.mpu()
    parsed = DeepSpeedConfig(config, mpu)
    deepspeed.set_optimizer_flags(parsed, module)
    engine = SelectiveEngine(args=None, model=module, optimizer=optimizer, mpu=mpu, config=config, config_class=parsed)
    engine._configure_python_gc()
    engine.attach(context)
    return engine
