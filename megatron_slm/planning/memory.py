"""Bytes on one rank of each stage, part by part. Pure.

The formulas were read off running steps: unique tensor storages of parameters, gradients, optimizer state and of
what autograd saves (tests/planning/test_memory.py measures again and compares). Symbols: n parameters on the rank, D
data-parallel size, T tensor-parallel size, e bytes of a number, t tokens of a micro-batch, d hidden size, q and kv
widths of queries and keys, f width of the MLP.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.engine.channels import Channel
from megatron_slm.engine.schedule.simulate import Sizes
from megatron_slm.loss.blocks import block_size, block_sizes
from megatron_slm.loss.variants import StashPlan
from megatron_slm.planning.job import Job
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.parameters import StageParameters, stage_parameters

_ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_param_persistence_threshold": 1e5,
    "overlap_comm": False,
}
"""DeepSpeed 0.19's, in elements; with stage 3, which overlaps by default, there is one bucket all the same."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of a stage at the worst moment of a step.

    All but the last are there during forward and backward passes. The optimizer's step comes after them, when
    activations are gone and its buffers are there instead.
    """

    parameters: int
    gradients: int
    optimizer: int
    """fp32 master weights and Adam's moments."""
    activations: int
    """What the micro-batches in flight keep for their backward passes."""
    working: int
    """What one forward or backward pass needs while it runs, the reference's included."""
    loss_head: int
    reference: int
    """The reference's weights."""
    window: int
    """Micro-batches read ahead, what the reference said of them, and its messages that wait."""
    messages: int
    """Messages between stages on their way."""
    buckets: int
    """DeepSpeed's buffers during forward and backward passes (ZeRO-2 and 3)."""
    step_buckets: int
    """Its buffers at the end of a step (ZeRO-1)."""
    host: int = 0
    """What is offloaded: in the host's memory, and not in the total."""

    @property
    def total(self) -> int:
        """The peak."""
        held = self.parameters + self.gradients + self.optimizer + self.reference + self.window + self.buckets
        return held + max(self.activations + self.working + self.loss_head + self.messages, self.step_buckets)

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**asdict(self), "total": self.total}

    @classmethod
    def part_names(cls) -> list[str]:
        """The parts, in order."""
        return [f.name for f in fields(cls)]


class Kept(Protocol):
    """What a schedule keeps; a `Simulation` says it."""

    def activations(self, stage: int) -> int:
        """Most micro-batches whose backward pass a stage still has to do."""
        ...

    def memory_bytes(self, stage: int, sizes: Sizes) -> int:
        """Bytes of what is done ahead."""
        ...


@dataclass(frozen=True)
class OneForwardOneBackward:
    """What every schedule keeps at least: its model is in the order 1F1B."""

    num_stages: int
    num_micro_batches: int

    def activations(self, stage: int) -> int:
        """As many as there are stages from here on."""
        return min(self.num_micro_batches, self.num_stages - stage)

    def memory_bytes(self, stage: int, sizes: Sizes) -> int:
        """Nothing is done ahead."""
        return 0


def stage_memory(job: Job, layout: Layout, kept: Kept) -> list[StageMemory]:
    """Memory of one rank of each stage under a schedule."""
    models = model_parameters(job, layout)
    references = _parameters(job, layout, job.reference) if job.reference else None
    sizes = schedule_sizes(job, layout)
    stages = []
    for stage, parameters in enumerate(models):
        states = zero_states(parameters, layout, e=job.dtype_bytes, deepspeed=job.deepspeed)
        reference = references[stage] if references else None
        frozen = reference.total * job.dtype_bytes if reference else 0  # whole, at every ZeRO stage
        stages.append(
            StageMemory(
                **states,
                activations=kept.activations(stage) * stage_activations(job, layout, parameters),
                working=working_bytes(job, layout, parameters, reference) + _reduction_copy(job, layout, parameters),
                loss_head=loss_head_bytes(job, layout) * parameters.has_head,
                reference=frozen,
                window=kept.memory_bytes(stage, sizes),
                messages=_message_bytes(job, layout, stage),
            )
        )
    return stages


def model_parameters(job: Job, layout: Layout) -> list[StageParameters]:
    """The trained parameters that a rank of each stage holds before ZeRO partitions them."""
    return _parameters(job, layout, job.architecture)


def _parameters(job: Job, layout: Layout, arch: Architecture) -> list[StageParameters]:
    divisible = job.config.model.make_vocab_size_divisible_by
    return stage_parameters(arch, tensor=layout.tensor, num_stages=layout.pipeline, vocabulary_divisible_by=divisible)


def zero_states(parameters: StageParameters, layout: Layout, *, e: int, deepspeed: dict[str, Any]) -> dict[str, int]:
    """What DeepSpeed's optimizers hold of a stage's parameters.

    | engine | parameters | gradients | optimizer | buffers |
    |---|---|---|---|---|
    | ZeRO-1 bf16 (`BF16_Optimizer`) | 2n | 4n, summed as they come | 12n/D | flattened copies at the step |
    | ZeRO-1 fp32 | 4n | 4n | 12n/D | one bucket; another and a partition at the step |
    | ZeRO-2 | en | 4n/D | 12n/D | one bucket |
    | ZeRO-3 | en/D, small ones whole, and those gathered | 4n/D | 12n/D | one bucket |

    ZeRO-3 with the optimizer offloaded has gradients and optimizer in the host's memory.
    """
    zero, c = deepspeed["zero_optimization"], ds_config.communication_bytes(deepspeed)
    options = {**_ZERO_DEFAULTS, **{k: v for k, v in zero.items() if v is not None}}
    n, data = parameters.total, layout.data
    bucket = int(options["reduce_bucket_size"])
    share = -(-n // data)
    held = {"parameters": e * n, "gradients": 4 * share, "optimizer": 12 * share}
    held |= {"buckets": 0, "step_buckets": 0, "host": 0}
    if layout.zero_stage == 1 and e == 2:
        copies = 4 * n * (n <= bucket)  # tensors beyond a bucket are reduced one by one, without a fp32 copy
        return held | {"gradients": 4 * n, "step_buckets": copies + 2 * n * (c == 2)}
    if layout.zero_stage == 1:  # the engine makes a bucket at the first backward pass, and another to reduce with
        return held | {"gradients": 4 * n, "buckets": 4 * bucket, "step_buckets": 4 * bucket + 4 * share}
    if layout.zero_stage == 2:
        return held | {"buckets": e * bucket * (2 if options["overlap_comm"] else 1)}
    held["buckets"] = c * bucket
    small = sum(size for size in parameters.sizes if size <= options["stage3_param_persistence_threshold"])
    gathered = min(n - small, int(options["stage3_max_live_parameters"]))
    held["parameters"] = e * (share + small + gathered)
    if ds_config.offloads_optimizer(deepspeed):  # gradients are summed and kept in the host's memory, in two places
        held |= {"gradients": 0, "optimizer": 0, "host": 20 * share}
    return held


def block_activations(arch: Architecture, layout: Layout, *, e: int) -> float:
    """Bytes a token that autograd keeps of one block.

    Twice a norm: its input in fp32 and its output before the weight, both cut along the sequence under sequence
    parallelism, and the input of the linear layer, which is not. The queries, keys and values as they are projected,
    queries and keys again after their rotation, the attention's output and its log-sum-exp. The MLP's two inner
    layers, the activation of one and their product.
    """
    d, shards, tensor = arch.hidden_size, layout.sequence_shards, layout.tensor
    q, kv = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    norms = 2 * (((4 + e) * d + 4) / shards + e * d)
    attention = (e * (3 * q + 3 * kv) + 4 * arch.num_attention_heads) / tensor
    return norms + attention + 4 * e * arch.ffn_hidden_size / tensor


def stage_activations(job: Job, layout: Layout, parameters: StageParameters) -> int:
    """Bytes that one micro-batch keeps on a stage from its forward to its backward pass, the loss's left out."""
    arch, e = job.architecture, job.dtype_bytes
    residual = e * arch.hidden_size / layout.sequence_shards
    per_token = 0.0
    if layout.recomputes:  # the input of each layer
        per_token += residual * parameters.num_blocks
    else:
        per_token += parameters.num_blocks * block_activations(arch, layout, e=e)
        if e == 2 and not parameters.has_embedding:  # what came in; in fp32 the first norm keeps that very tensor
            per_token += residual
    if parameters.has_head:
        per_token += ((4 + e) * arch.hidden_size + 4) / layout.sequence_shards
        per_token += e * arch.hidden_size  # the rows that the loss reads
    rows_are_copied = layout.micro_batch_size > 1 or layout.sequence_shards > 1
    if layout.zero_stage == 1 and (rows_are_copied or not parameters.has_head):  # the engine holds what came out
        per_token += residual
    if parameters.has_embedding:
        per_token += 8 + (layout.tensor > 1)  # token ids, and which of them are elsewhere
    return round(per_token * _tokens(job, layout))


def working_bytes(job: Job, layout: Layout, parameters: StageParameters, reference: StageParameters | None) -> int:
    """Bytes that the largest single pass of a stage needs beside what is kept: an estimate.

    The model's backward pass: gradients of the MLP's inner layers and of a norm in fp32, and with recomputation
    the activations of one block. The reference's forward pass: the MLP's inner layers and a norm.
    """
    e, tokens = job.dtype_bytes, _tokens(job, layout)

    def inner(arch: Architecture) -> float:
        return 4 * e * arch.ffn_hidden_size / layout.tensor + (8 + 2 * e) * arch.hidden_size / layout.sequence_shards

    model = inner(job.architecture) if parameters.num_blocks else 0.0
    model += e * max(parameters.sizes, default=0) / tokens  # a gradient until it is added to its fp32 sum
    if layout.recomputes and parameters.num_blocks:
        model += block_activations(job.architecture, layout, e=e)
    frozen = 0.0
    if reference is not None and job.reference is not None:
        frozen = inner(job.reference)
    return round(max(model, frozen) * tokens)


def _reduction_copy(job: Job, layout: Layout, parameters: StageParameters) -> int:
    """ZeRO-2 copies a full bucket of bf16 gradients to fp32 where they are reduced in fp32."""
    c = ds_config.communication_bytes(job.deepspeed)
    if layout.zero_stage != 2 or c <= job.dtype_bytes:
        return 0
    bucket = job.deepspeed["zero_optimization"].get("reduce_bucket_size") or _ZERO_DEFAULTS["reduce_bucket_size"]
    return c * min(parameters.total, int(bucket))


def loss_head_plan(job: Job, layout: Layout) -> StashPlan:
    """What the loss keeps between its passes."""
    columns = job.padded_vocabulary(job.architecture) // layout.tensor
    dtype = torch.bfloat16 if job.config.training.bf16 else torch.float32
    return job.loss_head.plan(_tokens(job, layout), columns, job.keep_ratio, dtype)


def stash_bytes(job: Job, layout: Layout) -> int:
    """Bytes of what the loss keeps of one micro-batch from its forward to its backward pass (`loss/stash.py`)."""
    rows, columns = _tokens(job, layout), job.padded_vocabulary(job.architecture) // layout.tensor
    plan = loss_head_plan(job, layout)
    if plan.capacity == 0:
        return 0
    return plan.capacity * columns * plan.dtype.itemsize + rows * (8 + 4 * len(block_sizes(columns, on_gpu=True)))


def loss_head_bytes(job: Job, layout: Layout) -> int:
    """Bytes of the loss of one micro-batch: what it keeps between its passes, and the larger one's own memory."""
    arch, e, rows = job.architecture, job.dtype_bytes, _tokens(job, layout)
    columns = job.padded_vocabulary(arch) // layout.tensor
    plan, kept, block = loss_head_plan(job, layout), round(job.keep_ratio * rows), min(block_size(on_gpu=True), columns)
    forward = 4 * plan.chunk_rows * block
    if 0 < plan.capacity < rows:  # a chunk's exponentials, before the likely rows are picked
        forward += plan.chunk_rows * columns * plan.dtype.itemsize
    gradients = e * columns * arch.hidden_size + e * rows * arch.hidden_size
    backward = gradients + (4 + e) * kept * (arch.hidden_size + block)
    return stash_bytes(job, layout) + max(forward, backward) + 20 * kept


def schedule_sizes(job: Job, layout: Layout) -> Sizes:
    """What the schedule keeps more or less of, in bytes on one rank."""
    width = job.reference.hidden_size if job.reference else 0
    message = _tokens(job, layout) // layout.sequence_shards * width * job.dtype_bytes
    return Sizes.of_micro_batch(layout.micro_batch_size, job.config.data.seq_length, reference_message=message)


def _message_bytes(job: Job, layout: Layout, stage: int) -> int:
    """Gradients sent back that have not left, one that comes in, and the reference's messages that have not left.

    The model's own activations on their way are counted where they are kept.
    """
    tokens = _tokens(job, layout) // layout.sequence_shards
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    in_flight = min(Channel.MAX_SENDS_IN_FLIGHT, layout.num_micro_batches)
    widths = (in_flight * (not is_first) + (not is_last)) * job.architecture.hidden_size
    if job.reference is not None and not is_last:
        widths += in_flight * job.reference.hidden_size
    return widths * tokens * job.dtype_bytes


def _tokens(job: Job, layout: Layout) -> int:
    return layout.micro_batch_size * job.config.data.seq_length
