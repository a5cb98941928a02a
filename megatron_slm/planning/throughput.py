"""How long a step takes: computations counted and timed by an assumed efficiency, put in order by the real schedule.

What is assumed is in `Cluster` and in docs/planning.md. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import BackwardConfig, planned_share
from megatron_slm.engine.schedule.costs import Costs, forward_flops, planned_passes
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.job import Job
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.memory import loss_head_plan, model_parameters

TICKS = 30_000
"""`Costs.scaled` makes a stage's mean forward and backward pass this long."""
HOST_BYTES_PER_SECOND = 10e9
"""One rank's share of its host's memory bandwidth (eight GPUs on a host of some hundred GB/s), and of its PCIe link."""
HOST_UPDATE_BYTES = 120
"""A number of an offloaded optimizer: torch's AdamW goes over the host's memory in about a dozen passes."""
HOP_LATENCY_SECONDS = 20e-6
"""From the end of a stage's pass to the start of the next stage's, beside the message's own length."""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of one micro-batch's passes on each stage, tensor-parallel communication included."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    reference: tuple[float, ...]
    """Zeros where no reference runs."""
    exact_backward: tuple[float, ...]
    """Of backward passes on all rows of the gradient; `backward` where rows are not sampled."""

    @property
    def costs(self) -> Costs:
        """The same in ticks."""
        exact = None if self.exact_backward == self.backward else self.exact_backward
        return Costs.scaled(self.forward, self.backward, self.reference, exact)

    @property
    def seconds_per_tick(self) -> float:
        """Length of a tick of `costs`."""
        return (sum(self.forward) + sum(self.backward)) / (TICKS * len(self.forward))

    def least_step_seconds(self, num_micro_batches: int) -> float:
        """What no schedule can beat: a stage's own work, and the model's first and last micro-batch around it."""
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
    """Forward, backward and reference passes as the schedule orders them, idle time included."""
    messages: float
    """What messages between stages add while the pipeline fills and empties."""
    gradients: float
    """Reduction over data-parallel ranks that no computation hides."""
    optimizer: float
    """The update, and the parameters gathered afterwards."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.schedule + self.messages + self.gradients + self.optimizer


def stage_durations(job: Job, layout: Layout, cluster: Cluster) -> Durations:
    """How long each stage's passes take.

    A backward pass is two forwards, or three with recomputation, and less on some of the rows. The loss scores all
    rows (one product), and differentiates the kept ones (two), made again first unless it kept them. Collectives of
    tensor parallelism wait for computations and are waited for: two all-reduces (or their halves) a block and
    direction.
    """
    rate = cluster.gpu.flops(bf16=job.config.training.bf16) * cluster.efficiency * layout.tensor
    tokens = layout.micro_batch_size * job.config.data.seq_length

    def passes(arch: Architecture) -> tuple[list[float], list[float], float]:
        flops, head = forward_flops(arch, layout.pipeline, job.config.data.seq_length)
        ring = _all_reduce_seconds(tokens * arch.hidden_size * job.dtype_bytes, layout.tensor, 1, cluster)
        blocks = _blocks(arch, layout.pipeline)
        return [tokens * x / rate for x in flops], [2 * ring * n for n in blocks], tokens * head / rate

    compute, talk, head = passes(job.architecture)
    kept_units = 2 if loss_head_plan(job, layout).capacity else 3
    forward = [c + t for c, t in zip(compute, talk, strict=True)]
    forward[-1] += head

    def backward_pass(rows: BackwardConfig) -> tuple[float, ...]:
        length, share = job.config.data.seq_length, planned_share(rows, job.keep_ratio)
        passes = planned_passes(job.architecture, length, rows, job.keep_ratio, recomputes=layout.recomputes)
        # of the two all-reduces of a block, and of the two that recompute it, one is of the rows alone
        talks = (1 + layout.recomputes) * (1 + share) / 2
        backward = [passes * c + talks * t for c, t in zip(compute, talk, strict=True)]
        backward[-1] += kept_units * job.keep_ratio * head
        return tuple(backward)

    backward, exact = backward_pass(job.config.backward), backward_pass(BackwardConfig())
    reference = [0.0] * layout.pipeline
    if job.reference is not None:
        frozen, frozen_talk, frozen_head = passes(job.reference)
        reference = [c + t for c, t in zip(frozen, frozen_talk, strict=True)]
        reference[-1] += frozen_head
    return Durations(forward=tuple(forward), backward=backward, reference=tuple(reference), exact_backward=exact)


def step_time(job: Job, layout: Layout, cluster: Cluster, *, schedule_seconds: float) -> StepTime:
    """A step around its schedule.

    ZeRO-1 reduces gradients once a step, after the last backward pass (all-reduce, in communication_data_type), ZeRO-2
    after every micro-batch, both waited for; ZeRO-3 gathers parameters twice and scatters gradients once a micro-batch,
    beside the computation. An offloaded optimizer is bound by the host's memory, and waits for gradients to go down.

    Args:
        schedule_seconds: of all passes as they are ordered.
    """
    size = max(stage.total for stage in model_parameters(job, layout))
    weights = size * job.dtype_bytes
    rounds = layout.num_micro_batches if layout.zero_stage > 1 else 1
    gather = _ring_seconds(weights, layout.data, layout.tensor, cluster)
    sums = size * ds_config.communication_bytes(job.deepspeed)
    scatter = _ring_seconds(sums, layout.data, layout.tensor, cluster)  # an all-reduce is two
    gradients = 2 * scatter * rounds
    update = size / layout.data * 32 / cluster.gpu.memory_bytes_per_second  # reads 16 bytes, writes 16, about
    if layout.zero_stage == 3:
        gradients, gather = max(0.0, (2 * gather + scatter) * rounds - schedule_seconds), 0.0
        if ds_config.offloads_optimizer(job.deepspeed):
            update = size / layout.data * HOST_UPDATE_BYTES / HOST_BYTES_PER_SECOND
    length = layout.micro_batch_size * job.config.data.seq_length // layout.sequence_shards
    stride = layout.tensor * layout.data
    message = length * job.architecture.hidden_size * job.dtype_bytes / cluster.hop_bytes_per_second(stride)
    hops = 2 * (layout.pipeline - 1)
    return StepTime(
        schedule=schedule_seconds,
        messages=hops * (message + HOP_LATENCY_SECONDS),
        gradients=gradients,
        optimizer=update + gather,
    )


def _blocks(arch: Architecture, num_stages: int) -> list[int]:
    share, extra = divmod(arch.num_layers, num_stages)
    return [share + (stage < extra) for stage in range(num_stages)]


def _ring_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster) -> float:
    """An all-gather or a reduce-scatter of `num_bytes` in all."""
    if num_ranks == 1:
        return 0.0
    return (num_ranks - 1) / num_ranks * num_bytes / cluster.ring_bytes_per_second(num_ranks, stride)


def _all_reduce_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster) -> float:
    return 2 * _ring_seconds(num_bytes, num_ranks, stride, cluster)
