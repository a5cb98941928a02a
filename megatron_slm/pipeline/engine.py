"""DeepSpeed's pipeline engine, running our schedules: the model, the reference beside it, and the selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron_slm.loss.objective import LossSums, Objective, StepSettings, evaluation_sums
from megatron_slm.parallel.topology import Topology
from megatron_slm.pipeline.channels import Channel, Channels, Lane
from megatron_slm.pipeline.gradients import gradients_scaled, sum_over_world
from megatron_slm.pipeline.module import StageModule
from megatron_slm.pipeline.schedule import Costs, Instruction, Kind, Mode, stage_programs
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import MicroBatch, TokenStatistics

BatchSource = Callable[[int], MicroBatch]
"""The step's micro-batch of a number, counted from 0 on this data-parallel rank."""


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What this stage works with beside the module DeepSpeed trains."""

    topology: Topology
    objective: Objective
    reference: FrozenStage | None
    scores: StoredScores | None
    """What the reference says, where it is read instead of computed."""
    mode: Mode
    costs: Costs
    message_shape: tuple[int, int, int]
    """Hidden states between the model's stages: [s or s / size, b, d]."""
    dtype: torch.dtype


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
        lanes = [lane for lane in Lane if lane is not Lane.REFERENCE or context.reference is not None]
        self._channels = Channels(context.topology, self.global_rank, self.device, lanes)
        self._batches: dict[int, MicroBatch] = {}
        self._reference_statistics: dict[int, TokenStatistics] = {}
        self._outgoing: dict[tuple[Lane, int], Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self.pipe_buffers: dict[str, dict[int, Any]] = {
            name: {} for name in ("inputs", "outputs", "output_tensors", "labels")
        }

    # ---- steps ------------------------------------------------------------------------------------------

    def train_step(self, source: BatchSource, settings: StepSettings) -> LossSums:
        """One optimizer step on `micro_batches` micro-batches; the step's sums over all ranks."""
        self.module.train()
        self._settings = settings
        return self._run(self.context.mode, self.micro_batches, source)

    @torch.no_grad()
    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Losses of held-out micro-batches over all ranks; no reference and no gradient."""
        self.module.eval()
        sums = self._run("evaluate", num_micro_batches, source)
        return sum_over_world(sums, self.device)

    def _run(self, mode: Mode, num_micro_batches: int, source: BatchSource) -> LossSums:
        self._source, self._sums = source, LossSums()
        program = stage_programs(mode, self.num_stages, num_micro_batches, self.context.costs)[self.stage_id]
        self._execute(program)
        self._channels.flush()
        return self._sums

    def _execute(self, program: Sequence[Instruction]) -> None:
        for kind, micro_batch in program:
            self._HANDLERS[kind](self, micro_batch)

    # ---- the model --------------------------------------------------------------------------------------

    def _load(self, i: int) -> None:
        if i not in self._batches:
            batch = self._source(i)
            self._batches[i] = MicroBatch(*(x.to(self.device) for x in batch))
            scores = self.context.scores
            if scores is not None and self.is_last_stage() and torch.is_grad_enabled():
                self._reference_statistics[i] = scores(batch).to(self.device)

    def _forward(self, i: int) -> None:
        if self.is_first_stage():
            x = self._batches[i].tokens_bs
        else:
            x = self._channels.previous[Lane.FORWARD].receive().requires_grad_(torch.is_grad_enabled())
        out = DeepSpeedEngine.forward(self, x)
        if torch.is_grad_enabled():
            self.pipe_buffers["inputs"][i], self.pipe_buffers["outputs"][i] = x, out
        if self.is_last_stage():
            self._loss(i, out)
        else:
            self._outgoing[Lane.FORWARD, i] = out
        self._batches.pop(i, None)

    def _loss(self, i: int, x_sbd: Tensor) -> None:
        batch, objective = self._batches[i], self.context.objective
        if torch.is_grad_enabled():
            reference = self._reference_statistics.pop(i, None)
            self._losses[i], sums = objective.loss(x_sbd, self.module.output_weight(), batch, reference, self._settings)
        else:
            sums = evaluation_sums(objective.statistics(x_sbd, self.module.output_weight(), batch), batch)
        if objective.tp.rank == 0:  # every tensor rank has the same; one of them is counted
            self._sums = self._sums + sums

    def _backward(self, i: int) -> None:
        if self.is_last_stage():
            DeepSpeedEngine.backward(self, self._losses.pop(i), scale_wrt_gas=False)
        else:
            self.grad_layer = self._channels.next[Lane.BACKWARD].receive()
            PipelineEngine._exec_backward_pass(self, i)
            del self.pipe_buffers["output_tensors"][i]
        del self.pipe_buffers["outputs"][i]
        x = self.pipe_buffers["inputs"].pop(i)
        if not self.is_first_stage():
            self._outgoing[Lane.BACKWARD, i] = x.grad

    # ---- the reference ----------------------------------------------------------------------------------

    def _reference(self, i: int) -> None:
        # called directly, not through the engine's forward: that would touch ZeRO's hooks and counters
        reference = self.context.reference
        assert reference is not None, "a schedule with reference instructions needs a reference"
        if self.is_first_stage():
            x = self._batches[i].tokens_bs
        else:
            x = self._channels.previous[Lane.REFERENCE].receive()
        out = reference(x)
        if self.is_last_stage():
            self._reference_statistics[i] = reference.statistics(out, self.context.objective, self._batches[i])
        else:
            self._outgoing[Lane.REFERENCE, i] = out

    # ---- messages ---------------------------------------------------------------------------------------

    def _send(self, lane: Lane, i: int) -> None:
        channels = self._channels.previous if lane is Lane.BACKWARD else self._channels.next
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

    def _optimizer_step(self, _: int) -> None:
        """Divide once, by the kept tokens of the whole batch, then step."""
        self._sums = sum_over_world(self._sums, self.device)
        # ZeRO averages over data-parallel ranks; the sum over them is what is divided
        factor = self.context.topology.data / max(self._sums.kept_tokens, 1.0)
        with gradients_scaled(self.optimizer, factor):
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
        Kind.REDUCE_GRADIENTS: lambda self, _: PipelineEngine._exec_reduce_grads(self),
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
