"""Bytes that the stages keep for their backward passes. Pure.

The formulas come from tensors that autograd saved (tests/planning/test_activations.py measures again and compares).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.recomputation import Granularity
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.parameters import StageParameters
from megatron_slm.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes per token that one block keeps on a rank, by part."""

    stream: float = 0.0
    """The residual stream at the block's input, and between attention and the feed-forward layer, where they are kept
    in its own dtype."""
    norms: float = 0.0
    """Inputs in fp32, and outputs before the weight."""
    linear_inputs: float = 0.0
    """Inputs of the linear layers that leave the residual stream: under sequence parallelism this rank's part."""
    projected: float = 0.0
    """Queries, keys and values."""
    attention: float = 0.0
    """Rotated queries and keys, output and log-sum-exp."""
    feed_forward: float = 0.0
    """The two inner layers; the activation of one (unless fused), and their product."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(astuple(self))


def has_compiled_kinds(arch: Architecture) -> bool:
    """Tell whether the model's norms and activation are of the kinds that are compiled by themselves."""
    return arch.activation == "silu" and not arch.zero_centered_norms


def fuses_elementwise(run: PlannedRun, layout: Layout) -> bool:
    """Tell whether element-wise work surely keeps less: where it is asked for by name, and compiled by itself."""
    asked = run.config.backend.compile_elementwise is True
    return (
        asked
        and has_compiled_kinds(run.architecture)
        and not run.compiles_blocks(
            zero_stage=layout.zero_stage,
            cuts_sequences=layout.context > 1,
            recomputes_selectively=layout.recomputation.granularity == "selective",
        )
    )


def block_activations(
    arch: Architecture,
    layout: Layout,
    *,
    e: int,
    some_rows: bool = False,
    fused: bool = False,
    recompute: Granularity | None = None,
) -> BlockActivations:
    """Return what one block keeps.

    A backward pass on some of the rows recomputes the second norm and everything after it for these rows: kept are
    its input and the two inner layers. Its first norm, unless zero-centered, keeps what a compiled one does.

    Args:
        fused: element-wise work is compiled by itself: norms keep their input as it is, and the activation nothing.
        recompute: what the block computes again.
    """
    d, shards, tensor = arch.hidden_size, layout.sequence_shards, layout.tensor
    q = arch.num_attention_heads * arch.kv_channels / tensor
    shares_heads = arch.num_query_groups < tensor
    kv = key_width(arch, layout)
    if recompute == "full":
        return BlockActivations(stream=e * d / shards)
    inner = 2 * e * arch.ffn_hidden_size / tensor
    if recompute == "selective":  # of keys and values what is projected here, gathered heads or not
        projected = e * (q + 2 * arch.num_query_groups * arch.kv_channels / tensor)
        return BlockActivations(stream=2 * e * d / shards, projected=projected, feed_forward=inner)
    whole_norms = 1 if some_rows else 2
    keeps_input = fused or (some_rows and not arch.zero_centered_norms)
    normed_heads = (4 + e) * (q + kv) if arch.qk_norm_of_all_heads else 0
    if layout.context > 1:  # keys and values of the own positions, and the output in stretches and as a whole
        projected, attended = 2 * kv, 3 * q
        projected += q + 2 * kv if some_rows else 0  # as they were projected, too
    else:
        projected, attended = (0 if shares_heads else q) + 2 * kv, 2 * q + kv  # a gathered head is kept without queries
    return BlockActivations(
        stream=(e * d if e == 4 or keeps_input else 2 * e * d) / shards if some_rows else 0.0,
        norms=(2 * whole_norms if arch.norm_placement == "around" else whole_norms)
        * (_zero_centered_norm(d) if arch.zero_centered_norms else _norm(d, e=e, fused=keeps_input))
        / shards,
        linear_inputs=whole_norms * e * d / shards,
        projected=e * projected + normed_heads,
        attention=e * attended + 4 * arch.num_attention_heads / tensor,
        feed_forward=inner if some_rows else (1.5 if fused else 2) * inner,
    )


def key_width(arch: Architecture, layout: Layout) -> float:
    """Return the width of the keys, or values, of a position that a rank's queries attend to."""
    if arch.num_query_groups < layout.tensor:
        return arch.kv_channels
    return arch.num_query_groups * arch.kv_channels / layout.tensor


def gathered_at_once(arch: Architecture, layout: Layout, *, e: int) -> float:
    """Return the bytes per token of the keys and values of whole sequences, and of their gradients, while one block's
    attention runs.

    In the backward pass these are keys, values, and the sums and one addend of their gradients.
    """
    return 5 * e * key_width(arch, layout) * layout.context if layout.context > 1 else 0.0


def _norm(width: int, *, e: int, fused: bool) -> int:
    """A norm's input in fp32 (fused: as it is), its output before the weight (fused: not), and a number, for a row."""
    return (e if fused else 4 + e) * width + 4


def _zero_centered_norm(width: int) -> int:
    """A norm's input and its output before the weight, both in fp32, and a number, for a row."""
    return 8 * width + 4


def capped_tables(arch: Architecture, layout: Layout, length: int) -> float:
    """Return the bytes per token of one block's attention tables, which a soft cap needs of every pair of positions.

    Hyperbolic tangents and shares, the latter in fp32: 8 bytes a head and pair in bf16 and in fp32.

    Args:
        length: positions of a sample.
    """
    return 0.0 if arch.attention_softcap is None else 8 * arch.num_attention_heads / layout.tensor * length


def recomputed_at_once(
    arch: Architecture, layout: Layout, *, num_blocks: int, e: int, length: int, fused: bool = False
) -> float:
    """Return the bytes per token that a backward pass makes again and holds at the same time.

    Of a whole run of blocks where they are computed again; else of the larger half of a block, whose products are
    kept.
    """
    rule, block = layout.recomputation, block_activations(arch, layout, e=e, fused=fused)
    if rule.granularity == "full":
        return max(rule.units(num_blocks), default=0) * (block.total + capped_tables(arch, layout, length))
    if rule.granularity == "selective" and num_blocks:
        return (block.norms + block.linear_inputs) / 2 + max(block.attention, block.feed_forward / 2)
    return 0.0


def offloaded_block(arch: Architecture, layout: Layout, *, e: int, recompute: Granularity | None) -> float:
    """Return the bytes per token of one block that go to the host: torch copies a tensor as often as it is saved.

    A norm saves its fp32 input and its scale twice, attention's output is saved as the next layer's input as well,
    and each rotation its four tables.
    """
    kept = block_activations(arch, layout, e=e, recompute=recompute)
    if recompute is not None:
        return kept.total
    q = arch.num_attention_heads * arch.kv_channels / layout.tensor
    kv = key_width(arch, layout)
    twice = 2 * (4 * arch.hidden_size + 4) / layout.sequence_shards
    tables = 16 * arch.kv_channels / layout.micro_batch_size
    attention = e * (3 * q + 2 * kv) + 4 * arch.num_attention_heads / layout.tensor
    if layout.context > 1:
        attention = kept.projected + kept.attention + e * q + 4 * e * kv * layout.context  # keys and values as a whole
    return kept.norms + twice + kept.linear_inputs + attention + tables + kept.feed_forward


def offloaded_activations(run: PlannedRun, layout: Layout, parameters: StageParameters) -> int:
    """Return the bytes in host memory of one micro-batch's activations on a stage."""
    if not layout.offloads:
        return 0
    arch, e, rule = run.architecture, run.dtype_bytes, layout.recomputation
    per_token = e * arch.hidden_size / layout.sequence_shards * len(rule.units(parameters.num_blocks))
    tables = capped_tables(arch, layout, run.config.data.seq_length)
    for count, recompute in rule.kinds(parameters.num_blocks):
        if recompute != "full":
            per_token += count * (offloaded_block(arch, layout, e=e, recompute=recompute) + tables)
    if parameters.has_head:
        per_token += ((8 + e) * arch.hidden_size + 8) / layout.sequence_shards
    return round(per_token * layout.micro_batch_size * run.config.data.seq_length // layout.context)


def stage_activations(run: PlannedRun, layout: Layout, parameters: StageParameters) -> int:
    """Return the bytes that one micro-batch keeps for backward on a stage's device, without the loss head."""
    arch, e, rule = run.architecture, run.dtype_bytes, layout.recomputation
    fused = fuses_elementwise(run, layout)
    residual = e * arch.hidden_size / layout.sequence_shards
    some_rows = not run.config.backward.is_exact
    per_token = 0.0
    if not layout.offloads:
        per_token += residual * len(rule.units(parameters.num_blocks))  # inputs of blocks that are computed again
        for count, recompute in rule.kinds(parameters.num_blocks):
            if recompute != "full":
                kept = block_activations(arch, layout, e=e, some_rows=some_rows, fused=fused, recompute=recompute)
                per_token += count * (kept.total + capped_tables(arch, layout, run.config.data.seq_length))
        if parameters.has_head:
            per_token += _norm(arch.hidden_size, e=e, fused=fused) / layout.sequence_shards
    as_it_is = e == 4 or fused  # the first norm keeps the same tensor
    keeps_inputs = not layout.offloads and (rule.granularity is not None or some_rows or as_it_is)
    if not keeps_inputs and not parameters.has_embedding:
        per_token += residual  # the stage's input
    if parameters.has_head:
        per_token += e * arch.hidden_size  # rows for the loss head
    rows_are_copied = layout.micro_batch_size > 1 or layout.sequence_shards > 1
    if layout.zero_stage == 1 and (rows_are_copied or not parameters.has_head):  # the engine holds the output
        per_token += residual
    if parameters.has_embedding:
        per_token += 8  # token ids
        if layout.tensor > 1:
            per_token += 1  # mask of ids on other ranks
    return round(per_token * layout.micro_batch_size * run.config.data.seq_length // layout.context)
