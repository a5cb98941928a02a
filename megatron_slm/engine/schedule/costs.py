"""Costs of a schedule: the duration of each computation on each stage. Pure; no processes, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import BackwardConfig, planned_share
from megatron_slm.config.distillation import DistillationConfig
from megatron_slm.config.recomputation import KEEP_ALL, Granularity, Recomputation
from megatron_slm.model.partition import stage_blocks


class Work(Enum):
    """A kind of computation."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Duration of each computation on each stage, in ticks (integers of at least 1), first stage first.

    Only proportions matter; wrong ones cost time, never correctness. They are integers, because with float times two
    events that are meant to coincide can sort differently from their cause.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    reference: tuple[int, ...]
    exact_backward: tuple[int, ...] | None = None
    """The model's backward passes on all rows of the gradient; None where `backward` is these."""

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "reference"):
            ticks = getattr(self, name)
            assert len(ticks) == len(self.forward), f"{name} costs of {len(ticks)} stages"
            assert min(ticks) >= 1, f"{name} costs {ticks}"

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.forward)

    @property
    def plain(self) -> Costs:
        """The same with backward passes on all rows: what plain training is made of."""
        return self if self.exact_backward is None else replace(self, backward=self.exact_backward, exact_backward=None)

    @property
    def max_unread(self) -> int:
        """Most reference results of one stage that the next has not begun to read, which bounds their memory.

        As many as a stage makes while the model does one micro-batch, and two: fewer cost time, more gain none.
        """
        in_one_micro_batch = (sum(self.forward) + sum(self.backward)) / sum(self.reference)
        return min(2 + math.ceil(in_one_micro_batch), 24)

    def of(self, work: Work) -> tuple[int, ...]:
        """Return the ticks of one kind of computation on every stage."""
        return {Work.FORWARD: self.forward, Work.BACKWARD: self.backward, Work.REFERENCE: self.reference}[work]

    @classmethod
    def scaled(
        cls,
        forward: Sequence[float],
        backward: Sequence[float],
        reference: Sequence[float],
        exact_backward: Sequence[float] | None = None,
    ) -> Costs:
        """Build costs from durations in any one unit; a stage's mean forward plus backward becomes 30,000 ticks."""
        ticks = 30_000 * len(forward) / (sum(forward) + sum(backward))

        def whole(durations: Sequence[float]) -> tuple[int, ...]:
            return tuple(max(1, round(duration * ticks)) for duration in durations)

        return cls(
            forward=whole(forward),
            backward=whole(backward),
            reference=whole(reference),
            exact_backward=None if exact_backward is None else whole(exact_backward),
        )

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        backward: float = 2.0,
        reference: float = 1.0,
        head_forward: float = 0.0,
        head_backward: float = 0.0,
        head_reference: float = 0.0,
        row_share: float = 1.0,
    ) -> Costs:
        """Build the costs of equal stages, the last of which also has the loss head.

        Args:
            row_share: part of the time of `backward` that sampled rows leave.
        """

        def stages(base: float, head: float) -> list[float]:
            return [base] * (num_stages - 1) + [base + head]

        return cls.scaled(
            stages(forward, head_forward),
            stages(row_share * backward, head_backward),
            stages(reference, head_reference),
            stages(backward, head_backward) if row_share < 1.0 else None,
        )


def block_flops(arch: Architecture, seq_length: int) -> float:
    """Count the floating-point operations of one block's forward pass for one token, causal attention as half."""
    queries, keys = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    weights = arch.hidden_size * (2 * queries + 2 * keys) + 3 * arch.hidden_size * arch.ffn_hidden_size
    return 2.0 * weights + attention_flops(arch, seq_length)


def attention_flops(arch: Architecture, seq_length: int) -> float:
    """Count those of the products with keys and values alone, of blocks with and without a window on average."""
    seen = seq_length / 2
    if arch.sliding_window is not None:
        windows = [arch.window_of(block) for block in range(arch.num_layers)]
        seen = sum(seen if window is None else min(window, seen) for window in windows) / arch.num_layers
    return 4.0 * seen * arch.num_attention_heads * arch.kv_channels


def backward_passes(
    arch: Architecture,
    seq_length: int,
    *,
    recompute: Granularity | None = None,
    row_share: float = 1.0,
    all_keys: bool = True,
) -> float:
    """Length of a block's backward pass, in forward passes: 2 on all rows, 3 where the block is computed again, and
    between them where attention's core is.

    On a share of the rows, attention's own products and (with `all_keys`) the projections of keys and values stay
    whole; recomputed are attention with all projections before it, and the rest on the rows.
    """
    whole = block_flops(arch, seq_length)
    queries, keys = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    projected = 2.0 * arch.hidden_size * queries
    key_value = 4.0 * arch.hidden_size * keys
    attention = attention_flops(arch, seq_length)
    on_rows = whole - key_value - attention
    flops = 2 * (row_share * on_rows + (1.0 if all_keys else row_share) * key_value + attention)
    if recompute == "selective":
        flops += attention
    elif recompute == "full":
        flops += attention + key_value + projected + row_share * (on_rows - projected)
    return flops / whole


def forward_flops(arch: Architecture, num_stages: int, seq_length: int) -> tuple[list[float], float]:
    """Count the operations of one token's forward pass: of each stage without the loss head, and of the head.

    Blocks are cut as the models are; the embedding is a lookup, counted as one pass over its row.
    """
    stages = [count * block_flops(arch, seq_length) for count in stage_blocks(arch.num_layers, num_stages)]
    stages[0] += 2.0 * arch.hidden_size
    return stages, 2.0 * arch.hidden_size * arch.vocab_size


def training_flops(arch: Architecture, seq_length: int) -> float:
    """Count the operations of training on one token, the usual way for MFU: three forwards, the loss head whole.

    Neither recomputation counts nor the part of the head's backward pass that the selection saves.
    """
    return 3 * inference_flops(arch, seq_length)


def inference_flops(arch: Architecture, seq_length: int) -> float:
    """Count the operations of one token's forward pass, the loss head included."""
    stages, head = forward_flops(arch, 1, seq_length)
    return sum(stages) + head


def arithmetic_costs(
    model: Architecture,
    references: Sequence[Architecture],
    num_stages: int,
    *,
    seq_length: int,
    keep_ratio: float,
    recomputation: Recomputation = KEEP_ALL,
    rows: BackwardConfig | None = None,
    distillation: DistillationConfig | None = None,
) -> Costs:
    """Count the costs of operations; a block's backward pass is two forwards, and what it computes again.

    Sampled rows shorten it. The loss head computes all rows forwards, and recomputes and differentiates the kept ones:
    1 and 3 * keep ratio (see `loss/variants.py`). A reference's head computes all rows forwards. Distillation from
    it does the head's work on the kept rows forwards, and the reference's products with them.
    """
    stages, head = forward_flops(model, num_stages, seq_length)
    blocks = stage_blocks(model.num_layers, num_stages)
    ways: list[BackwardConfig] = [BackwardConfig()]
    if rows is not None and not rows.is_exact:
        ways.append(rows)
    lengths = [
        [mean_passes(model, seq_length, way, keep_ratio, recomputation, num_blocks=count) for count in blocks]
        for way in ways
    ]
    forward = list(stages)
    exact, *sampled = [[a * cost for a, cost in zip(length, stages, strict=True)] for length in lengths]
    forward[-1] += head
    frozen, distills = [0.0 if references else 1.0] * num_stages, False
    for reference in references:
        frozen_stages, frozen_head = forward_flops(reference, num_stages, seq_length)
        frozen = [before + cost for before, cost in zip(frozen, frozen_stages, strict=True)]
        frozen[-1] += frozen_head
        if distillation is not None and distillation.distills:
            distills = True
            forward[-1] += keep_ratio * (distillation.num_passes * (head + frozen_head) + 2 * head)
    if not distills:
        for backward in (exact, *sampled):
            backward[-1] += 3.0 * keep_ratio * head
    return Costs.scaled(forward, sampled[0] if sampled else exact, frozen, exact if sampled else None)


def planned_passes(
    arch: Architecture, seq_length: int, rows: BackwardConfig, keep_ratio: float, *, recompute: Granularity | None
) -> float:
    """Length of a block's backward pass, in forward passes, as a run is configured."""
    share, all_keys = planned_share(rows, keep_ratio), rows.backward_rows != "kept"
    return backward_passes(arch, seq_length, recompute=recompute, row_share=share, all_keys=all_keys)


def mean_passes(
    arch: Architecture,
    seq_length: int,
    rows: BackwardConfig,
    keep_ratio: float,
    recomputation: Recomputation,
    *,
    num_blocks: int,
) -> float:
    """Mean of `planned_passes` over the blocks of a stage, of which some may be computed again and others not."""
    (first, found), *others = [
        (count, planned_passes(arch, seq_length, rows, keep_ratio, recompute=recompute))
        for count, recompute in recomputation.kinds(num_blocks)
    ]
    for count, passes in others:
        found = (first * found + count * passes) / (first + count)
    return found
