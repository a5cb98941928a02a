"""Predicts the bytes on one rank of each stage, by part. Pure.

The formulas come from measured steps: unique storages of parameters, gradients, optimizer state and tensors saved by
autograd (tests/planning/test_memory.py measures again and compares). Symbols: n parameters on the rank, D ranks with
the same, e bytes of an element, c bytes of an element in gradient communication.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import torch

from megatron_slm.arithmetic import ceil_div
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.engine.schedule.simulate import Sizes
from megatron_slm.loss.blocks import block_size, block_sizes
from megatron_slm.loss.dense_distillation import chunk_rows
from megatron_slm.loss.variants import StashPlan
from megatron_slm.parallel.channels import Channel
from megatron_slm.planning.activations import (
    capped_tables,
    fuses_elementwise,
    gathered_at_once,
    offloaded_activations,
    recomputed_at_once,
    stage_activations,
)
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.parameters import StageParameters, stage_parameters
from megatron_slm.planning.planned_run import PlannedRun

_ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_param_persistence_threshold": 1e5,
    "overlap_comm": False,
    "zero_hpz_partition_size": 1,
}
"""Defaults of DeepSpeed 0.19, in elements; stage 3 has one bucket although it overlaps by default."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of a stage.

    `activations`, `working`, `loss_head` and `messages` exist in forward and backward passes only, `step_buckets` only
    in the optimizer's step, all other parts at all times.
    """

    parameters: int
    gradients: int
    optimizer: int
    """fp32 master weights and Adam's moments."""
    activations: int
    """Activations saved for backward, of all micro-batches in flight."""
    working: int
    """Temporary memory of one forward or backward pass, of the model or the reference."""
    loss_head: int
    reference: int
    """Weights of the references, and those that are gathered where ranks share them."""
    window: int
    """Micro-batches read ahead, their reference results, and unread messages of the reference."""
    messages: int
    """Messages in flight between stages."""
    buckets: int
    """DeepSpeed's buffers during forward and backward passes (ZeRO-2 and 3)."""
    step_buckets: int
    """DeepSpeed's buffers in the optimizer's step (ZeRO-1)."""
    host: int = 0
    """Offloaded state and activations in host memory; not part of the total."""

    @property
    def total(self) -> int:
        """Peak of the GPU's memory in a step."""
        held = self.parameters + self.gradients + self.optimizer + self.reference + self.window + self.buckets
        return held + max(self.activations + self.working + self.loss_head + self.messages, self.step_buckets)

    def to_dict(self) -> dict[str, int]:
        """Return the parts and their total as JSON-compatible values."""
        return {**asdict(self), "total": self.total}

    @classmethod
    def part_names(cls) -> list[str]:
        """Return the names of the parts, in order."""
        return [f.name for f in fields(cls)]


class SavedActivations(Protocol):
    """Activations and results that a schedule keeps on each stage, such as a `Simulation`."""

    def activations(self, stage: int) -> int:
        """Return the maximum number of micro-batches whose backward pass is pending."""
        ...

    def memory_bytes(self, stage: int, sizes: Sizes) -> int:
        """Return the bytes of results computed ahead."""
        ...


@dataclass(frozen=True)
class OneForwardOneBackward:
    """Lower bound over all schedules: 1F1B for the model, and nothing computed ahead."""

    num_stages: int
    num_micro_batches: int

    def activations(self, stage: int) -> int:
        """Return the number of micro-batches in flight: one per stage from this one to the last."""
        return min(self.num_micro_batches, self.num_stages - stage)

    def memory_bytes(self, stage: int, sizes: Sizes) -> int:
        """Return 0."""
        return 0


def stage_memory(run: PlannedRun, layout: Layout, saved: SavedActivations) -> list[StageMemory]:
    """Return the memory of one rank of each stage under a schedule."""
    models = model_parameters(run, layout)
    references = [arch_parameters(run, layout, arch) for arch in run.references]
    sizes = schedule_sizes(run, layout)
    stages = []
    for stage, parameters in enumerate(models):
        states = zero_states(parameters, layout, e=run.dtype_bytes, deepspeed=run.deepspeed)
        states["host"] += saved.activations(stage) * offloaded_activations(run, layout, parameters)
        frozen = sum(
            reference_bytes(run, layout, arch, of_stages[stage])
            for arch, of_stages in zip(run.references, references, strict=True)
        )
        stages.append(
            StageMemory(
                **states,
                activations=saved.activations(stage) * stage_activations(run, layout, parameters),
                working=working_bytes(run, layout, parameters) + _reduction_copy(run, layout, parameters),
                loss_head=loss_head_bytes(run, layout) if parameters.has_head else 0,
                reference=frozen,
                window=saved.memory_bytes(stage, sizes),
                messages=_message_bytes(run, layout, stage),
            )
        )
    return stages


def reference_bytes(run: PlannedRun, layout: Layout, arch: Architecture, parameters: StageParameters) -> int:
    """Return the bytes of a reference's weights on one rank of a stage.

    Where data-parallel ranks share them, those of the layer that computes and of the next one are gathered, and an
    embedding that is the output weight as well, from its first use to its last.
    """
    copies = layout.topology.copies
    if not run.config.shares_reference(zero_stage=layout.zero_stage, copies=copies):
        averages = 4 if run.config.reference_update.updates else 0  # in fp32
        return (run.dtype_bytes + averages) * parameters.total
    shares = [ceil_div(size, copies) for size in parameters.layers]
    gathered = [copies * share for share in shares]
    kept = gathered.pop(0) if arch.tied else 0
    return run.dtype_bytes * (sum(shares) + kept + max(map(sum, pairwise(gathered))))


def model_parameters(run: PlannedRun, layout: Layout) -> list[StageParameters]:
    """Return the trained parameters of one rank of each stage, before ZeRO partitions them."""
    return arch_parameters(run, layout, run.architecture)


def arch_parameters(run: PlannedRun, layout: Layout, arch: Architecture) -> list[StageParameters]:
    """Return the parameters of a model on one rank of each stage, before data-parallel ranks share them."""
    divisible = run.config.model.make_vocab_size_divisible_by
    return stage_parameters(arch, tensor=layout.tensor, num_stages=layout.pipeline, vocabulary_divisible_by=divisible)


def zero_states(parameters: StageParameters, layout: Layout, *, e: int, deepspeed: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that DeepSpeed's optimizers hold for a stage's parameters, by part.

    | engine | parameters | gradients | optimizer | buffers |
    |---|---|---|---|---|
    | ZeRO-1 bf16 (`BF16_Optimizer`) | 2n | 4n, summed as they come | 12n/D | flattened copies at the step |
    | ZeRO-1 fp32 | 4n | 4n | 12n/D | one bucket; another and a partition at the step |
    | ZeRO-2 | en | 4n/D | 12n/D | one bucket |
    | ZeRO-3 | en/D, small ones whole, and those gathered | 4n/D | 12n/D | one bucket |

    With ZeRO-3's `zero_hpz_partition_size` H, a second share of en/H of the large ones comes on top.
    ZeRO-3 with an offloaded optimizer holds gradients and optimizer in host memory.
    """
    options, c = zero_options(deepspeed), ds_config.communication_bytes(deepspeed)
    n, data = parameters.total, layout.topology.copies
    bucket = int(options["reduce_bucket_size"])
    share = ceil_div(n, data)
    held = {"parameters": e * n, "gradients": 4 * share, "optimizer": 12 * share}
    held |= {"buckets": 0, "step_buckets": 0, "host": 0}
    if layout.zero_stage == 1 and e == 2:
        copies = 4 * n if n <= bucket else 0  # larger tensors are reduced one by one, without a fp32 copy
        casts = 2 * n if c == 2 else 0
        return held | {"gradients": 4 * n, "step_buckets": copies + casts}
    if layout.zero_stage == 1:  # one bucket from the first backward pass on, another for the reduction
        return held | {"gradients": 4 * n, "buckets": 4 * bucket, "step_buckets": 4 * bucket + 4 * share}
    if layout.zero_stage == 2:
        num_buckets = 2 if options["overlap_comm"] else 1
        return held | {"buckets": e * bucket * num_buckets}
    held["buckets"] = c * bucket
    small = sum(size for size in parameters.sizes if size <= options["stage3_param_persistence_threshold"])
    gathered = min(n - small, int(options["stage3_max_live_parameters"]))
    inside = min(int(options["zero_hpz_partition_size"]), data)
    second = ceil_div(n - small, inside) if inside > 1 else 0
    held["parameters"] = e * (share + small + gathered + second)
    if ds_config.offloads_optimizer(deepspeed):  # the host holds the summed gradients twice
        held |= {"gradients": 0, "optimizer": 0, "host": 20 * share}
    return held


def zero_options(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `zero_optimization`, with DeepSpeed's defaults for those that are not given."""
    given = {name: value for name, value in deepspeed["zero_optimization"].items() if value is not None}
    return {**_ZERO_DEFAULTS, **given}


def working_bytes(run: PlannedRun, layout: Layout, parameters: StageParameters) -> int:
    """Estimate the temporary bytes of a stage's largest pass.

    Backward of the model: gradients of the MLP's inner layers and of a norm in fp32, under sequence parallelism the
    gathered input of a linear layer and its gradient, and what is computed again. Forward of a reference: the MLP's
    inner layers and a norm. Either with the tables of a capped attention, and with the keys and values that context
    parallelism gathers.
    """
    e, tokens, length = run.dtype_bytes, _tokens(run, layout), run.config.data.seq_length

    def inner(arch: Architecture) -> float:
        gathered = 2 * e * arch.hidden_size if layout.sequence_shards > 1 else 0
        stream = (8 + 2 * e) * arch.hidden_size / layout.sequence_shards
        tables = capped_tables(arch, layout, length) + gathered_at_once(arch, layout, e=e)
        return 4 * e * arch.ffn_hidden_size / layout.tensor + stream + gathered + tables

    model = inner(run.architecture) if parameters.num_blocks else 0.0
    model += e * max(parameters.sizes, default=0) / tokens  # a gradient until it is added to its fp32 sum
    fused, num_blocks = fuses_elementwise(run, layout), parameters.num_blocks
    model += recomputed_at_once(run.architecture, layout, num_blocks=num_blocks, e=e, length=length, fused=fused)
    return round(max(model, *(inner(arch) for arch in run.references), 0.0) * tokens)


def _reduction_copy(run: PlannedRun, layout: Layout, parameters: StageParameters) -> int:
    """Return the bytes of ZeRO-2's fp32 copy of a full bucket, if bf16 gradients are reduced in fp32."""
    c = ds_config.communication_bytes(run.deepspeed)
    if layout.zero_stage != 2 or c <= run.dtype_bytes:
        return 0
    bucket = zero_options(run.deepspeed)["reduce_bucket_size"]
    return c * min(parameters.total, int(bucket))


def loss_head_plan(run: PlannedRun, layout: Layout) -> StashPlan:
    """Return the loss head's plan for one micro-batch: its stash and chunks."""
    columns = run.padded_vocabulary(run.architecture) // layout.tensor
    dtype = torch.bfloat16 if run.config.training.bf16 else torch.float32
    return run.loss_head.plan(_tokens(run, layout), columns, run.keep_ratio, dtype)


def stash_bytes(run: PlannedRun, layout: Layout) -> int:
    """Return the bytes of the loss head's stash (`loss/stash.py`) of one micro-batch."""
    rows, columns = _tokens(run, layout), run.padded_vocabulary(run.architecture) // layout.tensor
    plan = loss_head_plan(run, layout)
    if plan.capacity == 0:
        return 0
    return plan.capacity * columns * plan.dtype.itemsize + rows * (8 + 4 * len(block_sizes(columns, on_gpu=True)))


def loss_head_bytes(run: PlannedRun, layout: Layout) -> int:
    """Return the bytes of the loss head for one micro-batch: the stash, and the larger of its passes."""
    arch, e, rows = run.architecture, run.dtype_bytes, _tokens(run, layout)
    columns = run.padded_vocabulary(arch) // layout.tensor
    plan, kept, block = loss_head_plan(run, layout), round(run.keep_ratio * rows), min(block_size(on_gpu=True), columns)
    forward = 4 * plan.chunk_rows * block
    if 0 < plan.capacity < rows:  # exponentials of a chunk, before rows for the stash are chosen
        forward += plan.chunk_rows * columns * plan.dtype.itemsize
    gradients = e * columns * arch.hidden_size + e * rows * arch.hidden_size
    backward = gradients + (4 + e) * kept * (arch.hidden_size + block)
    if run.reference is not None and run.distills_live:  # its kept rows, and a chunk's logits and element-wise work
        backward += e * (kept + rows * (layout.sequence_shards > 1)) * run.reference.hidden_size
        backward += 4 * 4 * chunk_rows(kept) * block
    return stash_bytes(run, layout) + max(forward, backward) + 20 * kept


def schedule_sizes(run: PlannedRun, layout: Layout) -> Sizes:
    """Return the sizes, in bytes on one rank, of what a schedule keeps."""
    width = sum(arch.hidden_size for arch in run.references)
    message = _tokens(run, layout) // layout.sequence_shards * width * run.dtype_bytes
    length, distills = run.config.data.seq_length // layout.context, run.distills_live
    return Sizes.of_micro_batch(layout.micro_batch_size, length, reference_message=message, distills=distills)


def _message_bytes(run: PlannedRun, layout: Layout, stage: int) -> int:
    """Return the bytes of gradients being sent, one gradient being received, and reference messages being sent.

    Activations being sent count as saved activations.
    """
    tokens = _tokens(run, layout) // layout.sequence_shards
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    in_flight = min(Channel.MAX_SENDS_IN_FLIGHT, layout.num_micro_batches)
    num_gradients = (0 if is_first else in_flight) + (0 if is_last else 1)
    widths = num_gradients * run.architecture.hidden_size
    if not is_last:
        widths += in_flight * sum(arch.hidden_size for arch in run.references)
    return widths * tokens * run.dtype_bytes


def _tokens(run: PlannedRun, layout: Layout) -> int:
    """Tokens of a micro-batch on one rank."""
    return layout.micro_batch_size * run.config.data.seq_length // layout.context
