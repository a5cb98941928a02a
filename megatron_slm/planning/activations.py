"""Bytes that the stages keep for their backward passes. Pure.

The formulas come from tensors that autograd saved (tests/planning/test_activations.py measures again and compares).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_slm.config.architecture import Architecture
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.parameters import StageParameters
from megatron_slm.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes per token that one block keeps on a rank, by part."""

    stream: float
    """The residual stream between attention and the feed-forward layer, and at the block's input, where they are kept
    in its own dtype."""
    norms: float
    """Inputs in fp32, and outputs before the weight."""
    linear_inputs: float
    """Inputs of the linear layers that leave the residual stream: under sequence parallelism this rank's part."""
    projected: float
    """Queries, keys and values."""
    attention: float
    """Rotated queries and keys, output and log-sum-exp."""
    feed_forward: float
    """The two inner layers, the activation of one (unless fused), and their product."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(astuple(self))


def fuses_elementwise(run: PlannedRun, layout: Layout) -> bool:
    """Tell whether element-wise work surely keeps less: where it is asked for by name, and compiled by itself."""
    arch, asked = run.architecture, run.config.backend.compile_elementwise is True
    has_compiled_kinds = arch.activation == "silu" and not arch.zero_centered_norms
    return (
        asked
        and has_compiled_kinds
        and not run.compiles_blocks(zero_stage=layout.zero_stage, cuts_sequences=layout.context > 1)
    )


def block_activations(
    arch: Architecture, layout: Layout, *, e: int, some_rows: bool = False, fused: bool = False
) -> BlockActivations:
    """Return what one block keeps.

    A backward pass on some of the rows recomputes the second norm and everything after it for these rows: kept are
    its input and the two inner layers.

    Args:
        fused: element-wise work is compiled by itself: norms keep their input as it is, and the activation nothing.
    """
    d, shards, tensor = arch.hidden_size, layout.sequence_shards, layout.tensor
    q = arch.num_attention_heads * arch.kv_channels / tensor
    shares_heads = arch.num_query_groups < tensor
    kv = arch.kv_channels if shares_heads else arch.num_query_groups * arch.kv_channels / tensor
    whole_norms = 1 if some_rows else 2
    normed_heads = (4 + e) * (q + kv) if arch.qk_norm_of_all_heads else 0
    if layout.context > 1:  # the gathered keys and values of all positions, and the output in stretches and as a whole
        projected, attended = 2 * kv * layout.context, 3 * q
    else:
        projected, attended = (0 if shares_heads else q) + 2 * kv, 2 * q + kv  # a gathered head is kept without queries
    return BlockActivations(
        stream=(e * d if e == 4 or fused else 2 * e * d) / shards if some_rows else 0.0,
        norms=(2 * whole_norms if arch.norm_placement == "around" else whole_norms)
        * _norm(d, e=e, fused=fused)
        / shards,
        linear_inputs=whole_norms * e * d / shards,
        projected=e * projected + normed_heads,
        attention=e * attended + 4 * arch.num_attention_heads / tensor,
        feed_forward=(2 if some_rows else 3 if fused else 4) * e * arch.ffn_hidden_size / tensor,
    )


def _norm(width: int, *, e: int, fused: bool) -> int:
    """A norm's input in fp32 (fused: as it is), its output before the weight (fused: not), and a number, for a row."""
    return (e if fused else 4 + e) * width + 4


def stage_activations(run: PlannedRun, layout: Layout, parameters: StageParameters) -> int:
    """Return the bytes that one micro-batch keeps for backward on a stage, without the loss head."""
    arch, e, fused = run.architecture, run.dtype_bytes, fuses_elementwise(run, layout)
    residual = e * arch.hidden_size / layout.sequence_shards
    per_token = 0.0
    if layout.recomputes:  # the input of each layer
        per_token += residual * parameters.num_blocks
    else:
        some_rows = not run.config.backward.is_exact
        per_token += (
            parameters.num_blocks * block_activations(arch, layout, e=e, some_rows=some_rows, fused=fused).total
        )
        as_it_is = e == 4 or fused  # the first norm keeps the same tensor
        if not as_it_is and not parameters.has_embedding:  # the stage's input
            per_token += residual
    if parameters.has_head:
        per_token += _norm(arch.hidden_size, e=e, fused=fused) / layout.sequence_shards
        per_token += e * arch.hidden_size  # rows for the loss head
    rows_are_copied = layout.micro_batch_size > 1 or layout.sequence_shards > 1
    if layout.zero_stage == 1 and (rows_are_copied or not parameters.has_head):  # the engine holds the output
        per_token += residual
    if parameters.has_embedding:
        per_token += 8  # token ids
        if layout.tensor > 1:
            per_token += 1  # mask of ids on other ranks
    return round(per_token * layout.micro_batch_size * run.config.data.seq_length // layout.context)
