"""Predicts the time of a step: counted FLOPs at an assumed efficiency, in the order of the real schedule. Pure.

`Cluster` and docs/planning.md list the assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import BackwardConfig, planned_share
from megatron_slm.engine.schedule.costs import Costs, forward_flops, planned_passes
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.memory import loss_head_plan, model_parameters
from megatron_slm.planning.planned_run import PlannedRun

TICKS = 30_000
"""Mean length of a stage's forward and backward pass in `Costs.scaled`."""
HOST_BYTES_PER_SECOND = 10e9
"""One rank's share of host memory bandwidth (eight GPUs, a few hundred GB/s), and of its PCIe link."""
HOST_UPDATE_BYTES = 120
"""Host memory traffic per parameter of an offloaded optimizer: torch's AdamW makes about a dozen passes."""
HOP_LATENCY_SECONDS = 20e-6
"""Delay from the end of a stage's pass to the start of the next stage's, without the message's transfer time."""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of one micro-batch's passes on each stage, including tensor-parallel communication."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    reference: tuple[float, ...]
    """Zeros without a reference."""
    exact_backward: tuple[float, ...]
    """Backward passes on all rows of the gradient; equal to `backward` with --backward-rows exact."""

    @property
    def costs(self) -> Costs:
        """Durations in ticks."""
        exact = None if self.exact_backward == self.backward else self.exact_backward
        return Costs.scaled(self.forward, self.backward, self.reference, exact)

    @property
    def seconds_per_tick(self) -> float:
        """Seconds of a tick of `costs`."""
        return (sum(self.forward) + sum(self.backward)) / (TICKS * len(self.forward))

    def least_step_seconds(self, num_micro_batches: int) -> float:
        """Return a lower bound over all schedules: a stage's own work, plus the pipeline's fill and drain around it."""
        least, before, behind = 0.0, 0.0, 0.0
        for forward, backward, reference in zip(self.forward, self.backward, self.reference, strict=True):
            model = num_micro_batches * (forward + backward)
            least = max(least, before + model + behind, model + num_micro_batches * reference)
            before, behind = before + forward, behind + backward
        return least


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    schedule: float
    """Forward, backward and reference passes in the schedule's order, including idle time."""
    messages: float
    """Delay by messages between stages while the pipeline fills and drains."""
    gradients: float
    """Gradient reduction over data-parallel ranks that does not overlap with computation."""
    optimizer: float
    """Optimizer update, and the parameter all-gather after it."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.schedule + self.messages + self.gradients + self.optimizer


def stage_durations(run: PlannedRun, layout: Layout, cluster: Cluster) -> Durations:
    """Return the duration of each stage's passes.

    A backward pass costs two forward passes, or three with recomputation, and less on some of the rows. The loss head
    costs one matrix product over all rows forward, and over the kept rows two backward, or three if it recomputes
    their logits. Distillation from a reference that runs does the latter forward, and a product with the reference's
    output weight more. Tensor parallelism adds two all-reduces (or their halves) per block and direction, which do not
    overlap with computation.
    """
    rate = cluster.gpu.flops(bf16=run.config.training.bf16) * cluster.efficiency * layout.tensor
    tokens = layout.micro_batch_size * run.config.data.seq_length

    def passes(arch: Architecture) -> tuple[list[float], list[float], float]:
        flops, head = forward_flops(arch, layout.pipeline, run.config.data.seq_length)
        ring = _all_reduce_seconds(tokens * arch.hidden_size * run.dtype_bytes, layout.tensor, 1, cluster)
        blocks = _blocks(arch, layout.pipeline)
        return [tokens * x / rate for x in flops], [2 * ring * n for n in blocks], tokens * head / rate

    compute, communication, head = passes(run.architecture)
    forward = [x + y for x, y in zip(compute, communication, strict=True)]
    forward[-1] += head
    num_products = 2 if loss_head_plan(run, layout).capacity else 3

    def backward_pass(rows: BackwardConfig) -> tuple[float, ...]:
        length, share = run.config.data.seq_length, planned_share(rows, run.keep_ratio)
        num_passes = planned_passes(run.architecture, length, rows, run.keep_ratio, recomputes=layout.recomputes)
        # one of a block's two all-reduces has the rows alone, in its backward pass and in its recomputation
        num_communications = (1 + layout.recomputes) * (1 + share) / 2
        backward = [num_passes * x + num_communications * y for x, y in zip(compute, communication, strict=True)]
        if not run.distills_live:
            backward[-1] += num_products * run.keep_ratio * head
        return tuple(backward)

    reference = [0.0] * layout.pipeline
    if run.reference is not None:
        frozen_compute, frozen_communication, frozen_head = passes(run.reference)
        reference = [x + y for x, y in zip(frozen_compute, frozen_communication, strict=True)]
        reference[-1] += frozen_head
        if run.distills_live:  # the kept rows' whole second pass is done with the loss, over both models
            again = run.config.distillation.num_passes * (head + frozen_head) - (3 - num_products) * head
            forward[-1] += run.keep_ratio * (again + 2 * head)
    return Durations(
        forward=tuple(forward),
        backward=backward_pass(run.config.backward),
        reference=tuple(reference),
        exact_backward=backward_pass(BackwardConfig()),
    )


def step_time(run: PlannedRun, layout: Layout, cluster: Cluster, *, schedule_seconds: float) -> StepTime:
    """Return the time of a step, given that of its schedule.

    ZeRO-1 all-reduces gradients once per step, after the last backward pass and in communication_data_type; ZeRO-2
    after every micro-batch; neither overlaps with computation. ZeRO-3 gathers parameters twice and scatters gradients
    once per micro-batch, and overlaps both. An offloaded optimizer is bound by host memory bandwidth.

    Args:
        schedule_seconds: duration of all passes in the schedule's order.
    """
    size = max(stage.total for stage in model_parameters(run, layout))
    weights = size * run.dtype_bytes
    rounds = layout.num_micro_batches if layout.zero_stage > 1 else 1
    gather = _ring_seconds(weights, layout.data, layout.tensor, cluster)
    sums = size * ds_config.communication_bytes(run.deepspeed)
    scatter = _ring_seconds(sums, layout.data, layout.tensor, cluster)  # an all-reduce is two of these
    gradients = 2 * scatter * rounds
    update = size / layout.data * 32 / cluster.gpu.memory_bytes_per_second  # about 16 bytes read and 16 written
    if layout.zero_stage == 3:
        gradients, gather = max(0.0, (2 * gather + scatter) * rounds - schedule_seconds), 0.0
        if ds_config.offloads_optimizer(run.deepspeed):
            update = size / layout.data * HOST_UPDATE_BYTES / HOST_BYTES_PER_SECOND
    length = layout.micro_batch_size * run.config.data.seq_length // layout.sequence_shards
    stride = layout.tensor * layout.data
    message = length * run.architecture.hidden_size * run.dtype_bytes / cluster.hop_bytes_per_second(stride)
    hops = 2 * (layout.pipeline - 1)
    return StepTime(
        schedule=schedule_seconds,
        messages=hops * (message + HOP_LATENCY_SECONDS),
        gradients=gradients,
        optimizer=update + gather,
    )


def _blocks(arch: Architecture, num_stages: int) -> list[int]:
    share, extra = divmod(arch.num_layers, num_stages)
    return [share + 1 if stage < extra else share for stage in range(num_stages)]


def _ring_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster) -> float:
    """Return the time of an all-gather or reduce-scatter of `num_bytes` in total."""
    if num_ranks == 1:
        return 0.0
    return (num_ranks - 1) / num_ranks * num_bytes / cluster.ring_bytes_per_second(num_ranks, stride)


def _all_reduce_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster) -> float:
    return 2 * _ring_seconds(num_bytes, num_ranks, stride, cluster)
