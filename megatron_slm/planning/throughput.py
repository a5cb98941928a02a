"""Predicts the time of a step: passes costed by a roofline, in the order of the real schedule. Pure.

`Cluster` and docs/planning.md list the assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import BackwardConfig, planned_share
from megatron_slm.config.recomputation import Granularity
from megatron_slm.engine.schedule.costs import Costs, planned_passes
from megatron_slm.model.partition import stage_blocks
from megatron_slm.planning.activations import has_compiled_kinds, offloaded_activations
from megatron_slm.planning.communication import (
    all_reduce_seconds,
    exposed_seconds,
    num_buckets,
    num_gathered,
    ring_seconds,
)
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.memory import arch_parameters, loss_head_plan, model_parameters
from megatron_slm.planning.planned_run import PlannedRun
from megatron_slm.planning.roofline import Roofline, Work, block_backward, block_forward, head_backward, head_forward

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
    """Return the duration of each stage's passes (`roofline.py`).

    The loss head computes one matrix product over all rows forward, and over the kept rows two backward, or three if it
    recomputes their logits. Distillation from a reference that runs does the latter forward, and a product with the
    reference's output weight more. Tensor parallelism adds two all-reduces (or their halves) per block and direction,
    and a gather of the keys and values where ranks share a head; context parallelism gathers those of a sequence, for
    the backward pass once more. None overlaps with computation, nor do copies of offloaded activations.
    """
    roofline = Roofline(cluster=cluster, bf16=run.config.training.bf16)
    length = run.config.data.seq_length
    tokens = layout.micro_batch_size * length // layout.context
    compiles = run.compiles_blocks(
        zero_stage=layout.zero_stage,
        cuts_sequences=layout.context > 1,
        recomputes_selectively=layout.recomputation.granularity == "selective",
    )
    fuses = run.config.backend.fuses_elementwise_on_gpu(compiles_blocks=compiles)
    stages = model_parameters(run, layout)
    sums = [roofline.gradient_sum_seconds(stage.total) for stage in stages]

    def forward_pass(arch: Architecture) -> _Forward:
        work = block_forward(
            arch, length, tensor=layout.tensor, sequence_shards=layout.sequence_shards, e=run.dtype_bytes,
            fused=compiles or (fuses and has_compiled_kinds(arch)),
        )  # fmt: skip
        ring = all_reduce_seconds(tokens * arch.hidden_size * run.dtype_bytes, layout.tensor, 1, cluster)
        num_sharing = max(1, layout.tensor // arch.num_query_groups)
        heads = ring_seconds(2 * tokens * arch.kv_channels * run.dtype_bytes, num_sharing, 1, cluster)
        held = 2 * max(1, arch.num_query_groups // layout.tensor) * arch.kv_channels * run.dtype_bytes
        sequences = ring_seconds(tokens * layout.context * held, layout.context, layout.tensor, cluster)
        return _Forward(
            blocks=stage_blocks(arch.num_layers, layout.pipeline),
            work=work,
            compute=tokens * roofline.seconds(work),
            sums=2 * ring,
            gathers=heads + sequences,
            sequences=sequences,
            embedding=2 * tokens * arch.hidden_size * run.dtype_bytes / cluster.gpu.memory_bytes_per_second,
            head=tokens * roofline.seconds(head_forward(arch, tensor=layout.tensor)),
        )

    model = forward_pass(run.architecture)
    num_products = 2 if loss_head_plan(run, layout).capacity else 3
    kept_head = head_backward(run.architecture, tensor=layout.tensor, num_products=num_products)

    def backward_pass(rows: BackwardConfig) -> tuple[float, ...]:
        share = planned_share(rows, run.keep_ratio)

        def block(recompute: Granularity | None) -> float:
            num_passes = planned_passes(run.architecture, length, rows, run.keep_ratio, recompute=recompute)
            work = block_backward(
                model.work,
                num_passes=num_passes,
                row_share=share,
                recomputes=recompute is not None,
                fused=compiles or (fuses and has_compiled_kinds(run.architecture)),
            )
            # one of a block's two all-reduces has the rows alone, in its backward pass and in its recomputation
            sums = (2 if recompute == "full" else 1) * (1 + share) / 2 * model.sums
            gathers = (1 if recompute is None else 2) * model.gathers + model.sequences
            return tokens * roofline.seconds(work) + sums + gathers

        backward = [
            sum(num * block(kind) for num, kind in layout.recomputation.kinds(count)) + added + copied
            for count, added, copied in zip(model.blocks, sums, copies, strict=True)
        ]
        backward[0] += 2 * model.embedding
        if not run.distills_live:
            backward[-1] += run.keep_ratio * tokens * roofline.seconds(kept_head)
        return tuple(backward)

    copies = [offloaded_activations(run, layout, stage) / HOST_BYTES_PER_SECOND for stage in stages]
    reference = [0.0] * layout.pipeline
    forward = [computed + copied for computed, copied in zip(model.stages, copies, strict=True)]
    for arch in run.references:
        frozen = forward_pass(arch)
        reference = [before + seconds for before, seconds in zip(reference, frozen.stages, strict=True)]
        if run.distills_live:  # the kept rows' whole second pass is done with the loss, over both models
            passes = run.config.distillation.num_passes
            kept = tokens * roofline.seconds(kept_head) + (passes - 1) * model.head + passes * frozen.head
            forward[-1] += run.keep_ratio * kept
    return Durations(
        forward=tuple(forward),
        backward=backward_pass(run.config.backward),
        reference=tuple(reference),
        exact_backward=backward_pass(BackwardConfig()),
    )


def reference_fetch_seconds(run: PlannedRun, layout: Layout, cluster: Cluster) -> float:
    """Return the time to gather the references' weights once, layer by layer; 0 where every rank has them."""
    copies = layout.topology.copies
    if not run.config.shares_reference(zero_stage=layout.zero_stage, copies=copies):
        return 0.0
    stages = (parameters for arch in run.references for parameters in arch_parameters(run, layout, arch))
    return sum(
        ring_seconds(stage.total * run.dtype_bytes, copies, layout.tensor, cluster, num_calls=len(stage.layers))
        for stage in stages
    )


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """Seconds of one micro-batch's forward pass."""

    blocks: list[int]
    """Number of blocks of each stage."""
    work: Work
    """Of a block, for one token."""
    compute: float
    """Of a block, as the two that follow."""
    sums: float
    """Sums over tensor-parallel ranks."""
    gathers: float
    """Gathers of keys and values."""
    sequences: float
    """Those over sequences alone."""
    embedding: float
    head: float

    @property
    def stages(self) -> list[float]:
        """Seconds on each stage."""
        stages = [count * (self.compute + self.sums + self.gathers) for count in self.blocks]
        stages[0] += self.embedding
        stages[-1] += self.head
        return stages


def step_time(run: PlannedRun, layout: Layout, cluster: Cluster, *, schedule_seconds: float) -> StepTime:
    """Return the time of a step, given that of its schedule.

    ZeRO-1 all-reduces gradients once per step, after the last backward pass and in communication_data_type; ZeRO-2
    after every micro-batch; neither overlaps with computation. ZeRO-3 gathers each large parameter in every forward and
    backward pass (and recomputation), each layer of shared references once, and scatters gradients bucket by bucket
    once per micro-batch, beside the computation (`exposed_seconds`). An offloaded optimizer is bound by host memory
    bandwidth.

    Args:
        schedule_seconds: duration of all passes in the schedule's order.
    """
    largest = max(model_parameters(run, layout), key=lambda stage: stage.total)
    size = largest.total
    weights = size * run.dtype_bytes
    rounds = layout.num_micro_batches if layout.zero_stage > 1 else 1
    copies = layout.topology.copies
    buckets = num_buckets(largest, run.deepspeed)
    gather = ring_seconds(weights, copies, layout.tensor, cluster, num_calls=buckets)
    sums = size * ds_config.communication_bytes(run.deepspeed)
    scatter = ring_seconds(sums, copies, layout.tensor, cluster, num_calls=buckets)
    gradients = 2 * scatter * rounds  # an all-reduce is two of these
    update = size / copies * 32 / cluster.gpu.memory_bytes_per_second  # about 16 bytes read and 16 written
    if layout.zero_stage == 3:
        calls = num_gathered(largest, run.deepspeed)
        fetch = ring_seconds(weights, copies, layout.tensor, cluster, num_calls=calls)
        passes = 3 if layout.recomputation.granularity == "full" else 2
        communication = passes * fetch + reference_fetch_seconds(run, layout, cluster) + scatter
        gradients, gather = exposed_seconds(communication * rounds, schedule_seconds), 0.0
        if ds_config.offloads_optimizer(run.deepspeed):
            update = size / copies * HOST_UPDATE_BYTES / HOST_BYTES_PER_SECOND
    length = layout.micro_batch_size * run.config.data.seq_length // layout.context // layout.sequence_shards
    stride = layout.tensor * copies
    message = length * run.architecture.hidden_size * run.dtype_bytes / cluster.hop_bytes_per_second(stride)
    hops = 2 * (layout.pipeline - 1)
    return StepTime(
        schedule=schedule_seconds,
        messages=hops * (message + HOP_LATENCY_SECONDS),
        gradients=gradients,
        optimizer=update + gather,
    )
