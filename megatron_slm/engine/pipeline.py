"""DeepSpeed's pipeline engine, running our schedules: the model, the reference beside it, and the selection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.profiler import record_function

from megatron_slm.engine.channels import Channel, Channels, Lane
from megatron_slm.engine.facts import MicroBatchFacts, StepFacts
from megatron_slm.engine.gradients import accumulate_in_place, gradients_scaled, step_factor, sum_over_world
from megatron_slm.engine.measure import Stopwatch
from megatron_slm.engine.module import StageModule
from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.engine.schedule.programs import Instruction, Kind, Programs, Schedule, forward_programs
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import Sizes, describe
from megatron_slm.engine.timers import Timers
from megatron_slm.engine.trainer import BatchSource
from megatron_slm.engine.window import Window
from megatron_slm.loss.objective import Objective, Probed, StepSettings
from megatron_slm.loss.sums import LossSums, evaluation_sums
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import Documents, TokenStatistics

_TIMER = {
    Work.FORWARD: "forward-compute",
    Work.BACKWARD: "backward-compute",
    Work.REFERENCE: "reference-forward-compute",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What this stage works with beside the module DeepSpeed trains."""

    topology: Topology
    objective: Objective
    reference: FrozenStage | None
    scores: StoredScores | None
    """What the reference says, where it is read instead of computed."""
    schedule: Schedule
    """What to start with; `SelectiveEngine.adopt` changes it."""
    sizes: Sizes
    message_shape: tuple[int, int, int]
    """Hidden states between the model's stages: [s or s / size, b, d]."""
    dtype: torch.dtype
    keeps_documents_apart: bool = False
    """Whether layers must know where documents lie; every stage reads its micro-batches then."""
    timers: Timers = field(default_factory=Timers)
    activity: Activity = field(default_factory=Activity)


class SelectiveEngine(PipelineEngine):
    """A `PipelineEngine` whose step is a static program of instructions, one list per stage.

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
        self._window = Window()
        self.schedule, self._is_prepared = context.schedule, False
        self._stopwatch: Stopwatch | None = None
        self._outgoing: dict[tuple[Lane, int], Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self._probed: list[Probed] | None = None
        self._probe_settings: StepSettings | None = None
        self.pipe_buffers: dict[str, dict[int, Any]] = {
            name: {} for name in ("inputs", "outputs", "output_tensors", "labels")
        }

    # ---- steps ------------------------------------------------------------------------------------------

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """One optimizer step on `micro_batches` micro-batches; the step's sums over all ranks.

        Args:
            is_last: no step follows, so that none of its micro-batches is read, and no reference work is done
                for it.
        """
        self.module.train()
        self._settings = settings
        if not self._is_prepared:  # the first step of this process, or of a schedule
            self._run(self.schedule.prologue, source)
        self._run(self.schedule.last if is_last else self.schedule.step, source)
        self._window.advance(self.micro_batches)
        self._is_prepared = not is_last
        return self._sums

    def micro_batch_facts(self) -> list[MicroBatchFacts]:
        """What the last step saw of each micro-batch on this rank."""
        return self._facts.read()

    @torch.no_grad()
    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Losses of held-out micro-batches over all ranks; no reference and no gradient.

        What the training steps have done ahead stays where it is, results and messages alike.
        """
        self.module.eval()
        with self._beside_training():
            self._run(forward_programs(Work.FORWARD, self.num_stages, num_micro_batches), source)
        return sum_over_world(self._facts.in_order, self.device)

    @torch.no_grad()
    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """What the reference says of micro-batches outside of training; on the last stage only.

        Before the first step, or where nothing is done ahead: its messages travel on the reference's lane.
        """
        scores = self.context.scores
        if scores is not None and self.is_last_stage():
            return [scores(source(i)).to(self.device) for i in range(num_micro_batches)]
        if self.context.reference is None:
            return [None] * num_micro_batches
        assert not self._is_prepared, "messages of work done ahead are on their way"
        with self._beside_training():
            self._run(forward_programs(Work.REFERENCE, self.num_stages, num_micro_batches), source)
            return [self._window.take_reference(i) for i in range(num_micro_batches)]

    @torch.no_grad()
    def probe(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[Probed]:
        """What is said of the tokens of micro-batches, without a gradient; on the last stage only.

        Args:
            settings: None selects nothing.
        """
        self.module.eval()
        self._probe_settings, self._probed = settings, []
        with self._beside_training():
            for i, statistics in enumerate(references):
                if statistics is not None:
                    self._window.add_reference(i, statistics)
            self._run(forward_programs(Work.FORWARD, self.num_stages, len(references)), source)
        probed, self._probed = self._probed, None
        return probed

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Inside, micro-batches are numbered anew; what training has done ahead is there again afterwards."""
        ahead, self._window = self._window, Window()
        try:
            with self.context.timers.paused():
                yield
        finally:
            self._window = ahead

    def adopt(self, schedule: Schedule) -> None:
        """Go on with another schedule; the step before was told to be the last, so nothing is done ahead."""
        assert not self._is_prepared, "work done ahead belongs to the schedule that did it"
        self.schedule = schedule

    def start_measuring(self) -> None:
        """Time the computations of the following steps."""
        self._stopwatch = Stopwatch()

    def measured_costs(self) -> Costs:
        """What the steps since `start_measuring` took; ends the measuring. Collective over the world."""
        assert self._stopwatch is not None, "measuring was started"
        costs = self._stopwatch.costs(self.context.topology, self.device)
        self._stopwatch = None
        return costs

    def _run(self, programs: Programs, source: BatchSource) -> None:
        self._source, self._facts = source, StepFacts()
        self._execute(programs[self.stage_id])
        with self.context.timers.timing("send"):
            self._channels.flush()

    def _execute(self, program: Sequence[Instruction]) -> None:
        activity, length = self.context.activity, len(program)
        for index, (kind, micro_batch) in enumerate(program):
            activity.at(index, length, kind.value, micro_batch)
            which = f" of micro-batch {micro_batch}" if micro_batch >= 0 else ""
            with (
                translate_peer_errors(f"stage {self.stage_id}, {kind.value}{which}"),
                record_function(f"slm::{kind.value}"),
            ):
                self._HANDLERS[kind](self, micro_batch)

    @contextmanager
    def _timing(self, work: Work) -> Iterator[None]:
        stopwatch, timers = self._stopwatch, self.context.timers
        self._channels.before_computation()
        with (
            timers.timing(_TIMER[work]),
            nullcontext() if stopwatch is None else stopwatch.timing(work),
        ):
            yield

    def _receive(self, channel: Channel) -> Tensor:
        with self.context.timers.timing(f"{channel.lane.value}-recv"):
            return channel.receive()

    # ---- the model --------------------------------------------------------------------------------------

    def _load(self, i: int) -> None:
        if i in self._window:
            return
        with self.context.timers.timing("batch-generator"):
            read = self._source(i)
        self._window.add(i, read.to(self.device))
        scores = self.context.scores
        if scores is not None and self.is_last_stage() and torch.is_grad_enabled():
            self._window.add_reference(i, scores(read).to(self.device))

    def _documents(self, i: int) -> Documents | None:
        """Where the documents of a micro-batch lie; stages between the first and the last read it for that alone."""
        if not self.context.keeps_documents_apart:
            return None
        self._load(i)
        return self._window.batch(i).documents

    def _forward(self, i: int) -> None:
        if self.is_first_stage():
            x = self._window.batch(i).tokens_bs
        else:
            x = self._receive(self._channels.previous[Lane.FORWARD]).requires_grad_(torch.is_grad_enabled())
        documents = self._documents(i)
        with self._timing(Work.FORWARD):
            watch = self._facts.watch(i) if self.is_first_stage() and torch.is_grad_enabled() else None
            out = DeepSpeedEngine.forward(self, x, documents, watch)
            if torch.is_grad_enabled():
                self.pipe_buffers["inputs"][i], self.pipe_buffers["outputs"][i] = x, out
            if self.is_last_stage():
                self._loss(i, out)
            else:
                self._outgoing[Lane.FORWARD, i] = out
        self._window.remove(i)

    def _loss(self, i: int, x_sbd: Tensor) -> None:
        batch, objective, weight = self._window.batch(i), self.context.objective, self.module.output_weight()
        if self._probed is not None:
            reference = self._window.take_reference(i)
            self._probed.append(objective.probe(x_sbd, weight, batch, reference, self._probe_settings))
            return
        with self.context.timers.timing("loss-head"):
            if torch.is_grad_enabled():
                reference = self._window.take_reference(i)
                self._losses[i], sums = objective.loss(x_sbd, weight, batch, reference, self._settings)
            else:
                sums = evaluation_sums(objective.statistics(x_sbd, weight, batch), batch)
        if objective.tp.rank == 0:  # every tensor rank has the same; one of them is counted
            self._facts.add(i, sums)

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
            self._facts.see_gradient(i, x.grad)

    # ---- the reference ----------------------------------------------------------------------------------

    def _reference(self, i: int) -> None:
        # called directly, not through the engine's forward: that would touch ZeRO's hooks and counters
        reference = self.context.reference
        assert reference is not None, "a schedule with reference instructions needs a reference"
        if self.is_first_stage():
            x = self._window.batch(i).tokens_bs
        else:
            x = self._receive(self._channels.previous[Lane.REFERENCE])
        documents = self._documents(i)
        with self._timing(Work.REFERENCE):
            out = reference(x, documents)
            if self.is_last_stage():
                statistics = reference.statistics(out, self.context.objective, self._window.batch(i))
                self._window.add_reference(i, statistics)
            else:
                self._outgoing[Lane.REFERENCE, i] = out

    # ---- messages ---------------------------------------------------------------------------------------

    def _send(self, lane: Lane, i: int) -> None:
        channels = self._channels.previous if lane is Lane.BACKWARD else self._channels.next
        with self.context.timers.timing("send"):
            channels[lane].send(self._outgoing.pop((lane, i)))

    def _post_receive(self, lane: Lane) -> None:
        context = self.context
        channel: Channel = (self._channels.next if lane is Lane.BACKWARD else self._channels.previous)[lane]
        shape = context.message_shape
        if lane is Lane.REFERENCE:
            assert context.reference is not None, "reference messages need a reference"
            shape = (*shape[:2], context.reference.arch.hidden_size)
        channel.post_receive(shape, context.dtype, self.device)

    # ---- the end of a step ------------------------------------------------------------------------------

    def _reduce_gradients(self, _: int) -> None:
        with self.context.timers.timing("all-grads-sync"):
            PipelineEngine._exec_reduce_grads(self)

    def _optimizer_step(self, _: int) -> None:
        """Divide once, by the kept tokens of the whole batch, then step; unless the losses say that it must not be."""
        num_sources = self.context.objective.num_sources
        self._sums = sum_over_world(self._facts.in_order, self.device, num_sources=num_sources)
        factor = step_factor(self._sums, self._settings, self.context.topology.data)
        with self.context.timers.timing("optimizer"), gradients_scaled(self.optimizer, factor):
            PipelineEngine._exec_optimizer_step(self)

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


def pipeline_engine(module: StageModule, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> SelectiveEngine:
    """Build the engine as `deepspeed.initialize` would, which picks the engine's class by a fixed test."""
    mpu = module.mpu()
    parsed = DeepSpeedConfig(config, mpu)
    deepspeed.set_optimizer_flags(parsed, module)
    engine = SelectiveEngine(args=None, model=module, optimizer=optimizer, mpu=mpu, config=config, config_class=parsed)
    engine._configure_python_gc()
    return engine


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
