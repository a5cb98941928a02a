"""Costs counted from architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import BackwardConfig
from megatron_slm.config.distillation import DistillationConfig
from megatron_slm.config.recomputation import Recomputation
from megatron_slm.engine.schedule.costs import Costs, arithmetic_costs, backward_passes, block_flops, forward_flops
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import Simulation

ARCH = Architecture(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=1000,
)


def test_a_blocks_operations_are_counted_by_hand() -> None:
    projections = 64 * 64 * 2 + 64 * 32 * 2  # query and output; keys and values
    attention = 4 * 16 * 64  # scores and their use, half of 32 positions seen on average
    assert block_flops(ARCH, 32) == 2 * (projections + 3 * 64 * 128) + attention
    assert block_flops(replace(ARCH, sliding_window=4), 32) == 2 * (projections + 3 * 64 * 128) + 4 * 4 * 64


def test_uneven_stages_and_the_ends_of_the_model() -> None:
    stages, head = forward_flops(replace(ARCH, num_layers=7), 3, 32)
    block = block_flops(ARCH, 32)
    assert stages == [3 * block + 128, 2 * block, 2 * block]
    assert head == 2 * 64 * 1000


def test_costs_of_model_and_reference() -> None:
    half = replace(ARCH, num_layers=4)
    costs = arithmetic_costs(ARCH, [half], 4, seq_length=32, keep_ratio=0.5)
    again = arithmetic_costs(
        ARCH, [half], 4, seq_length=32, keep_ratio=0.5, recomputation=Recomputation(granularity="full")
    )
    assert costs.forward[1] == pytest.approx(2 * costs.reference[1], abs=1)
    assert costs.backward[1] == pytest.approx(2 * costs.forward[1], abs=1)
    assert again.backward[1] / again.forward[1] == pytest.approx(3, rel=1e-3)
    head = costs.forward[3] - costs.forward[1]
    assert costs.backward[3] - costs.backward[1] == pytest.approx(1.5 * head, abs=2)
    assert costs.reference[3] - costs.reference[1] == pytest.approx(head, abs=2)
    assert costs.forward[0] > costs.forward[1] == costs.forward[2]


def test_costs_of_distillation() -> None:
    """The kept rows' passes over both output weights are the last stage's, and forwards."""
    options = {"seq_length": 32, "keep_ratio": 0.5}
    costs = arithmetic_costs(ARCH, [ARCH], 4, **options, distillation=DistillationConfig(loss="jsd"))
    head = costs.reference[3] - costs.reference[1]
    assert costs.forward[3] - costs.forward[1] == pytest.approx(head * (1 + 0.5 * (2 * 2 + 2)), abs=3)
    assert costs.backward[3] == costs.backward[1]
    plain = arithmetic_costs(ARCH, [ARCH], 4, **options)
    assert arithmetic_costs(ARCH, [ARCH], 4, **options, distillation=DistillationConfig()) == plain


def test_a_reference_with_fewer_layers_than_stages() -> None:
    costs = arithmetic_costs(ARCH, [replace(ARCH, num_layers=2)], 4, seq_length=32, keep_ratio=0.6)
    assert costs.reference[2] == 1
    assert costs.reference[0] > costs.reference[1] > 1 < costs.reference[3]


def test_costs_are_whole_and_scaled_alike() -> None:
    costs = Costs.scaled([1.0, 2.0], [2.0, 4.0], [0.0, 3.0])
    assert costs == Costs(forward=(6667, 13333), backward=(13333, 26667), reference=(1, 20000))
    assert Costs.uniform(3) == Costs(forward=(10_000,) * 3, backward=(20_000,) * 3, reference=(10_000,) * 3)
    assert Costs.uniform(2, reference=0.5).max_unread == 8
    assert Costs.uniform(2, reference=0.01).max_unread == 24


def test_backward_passes_on_some_of_the_rows() -> None:
    """By hand: keys' and values' projections and attention stay whole; the rest is the share."""
    block, keys, attention = block_flops(ARCH, 32), 2 * 64 * 32 * 2, 4 * 16 * 64
    on_rows = block - keys - attention
    assert backward_passes(ARCH, 32) == pytest.approx(2.0)
    assert backward_passes(ARCH, 32, recompute="full") == pytest.approx(3.0)
    half = backward_passes(ARCH, 32, row_share=0.5)
    assert half * block == pytest.approx(2 * (0.5 * on_rows + keys + attention))
    kept = backward_passes(ARCH, 32, row_share=0.5, all_keys=False)
    assert (half - kept) * block == pytest.approx(keys)
    again = backward_passes(ARCH, 32, recompute="full", row_share=0.5)
    queries = 2 * 64 * 64
    assert (again - half) * block == pytest.approx(attention + keys + queries + 0.5 * (on_rows - queries))


def test_costs_with_sampled_rows_are_compared_with_plain_training() -> None:
    rows = BackwardConfig(backward_rows="sampled", backward_row_share=0.65)
    options = {"seq_length": 32, "keep_ratio": 0.6}
    exact = arithmetic_costs(ARCH, [ARCH], 4, **options)
    costs = arithmetic_costs(ARCH, [ARCH], 4, **options, rows=rows)
    assert costs.exact_backward is not None
    scale = exact.forward[1] / costs.forward[1]
    assert [x * scale for x in costs.exact_backward] == pytest.approx(list(exact.backward), rel=1e-3)
    assert costs.backward[1] / costs.forward[1] == pytest.approx(backward_passes(ARCH, 32, row_share=0.65), rel=1e-3)
    assert arithmetic_costs(ARCH, [ARCH], 4, **options, rows=BackwardConfig()) == exact


@pytest.mark.parametrize(
    ("stages", "micro_batches", "ratio"), [(2, 4, 0.90), (4, 8, 0.83), (4, 16, 0.95), (8, 16, 0.80)]
)
def test_the_skewed_schedule_with_two_thirds_of_the_rows(stages: int, micro_batches: int, ratio: float) -> None:
    """An equal reference hides in what the smaller backward leaves; plain training is 1."""
    costs = Costs.uniform(stages, row_share=0.68)
    simulation = Simulation(choose_schedule(Mode.SKEWED, costs, micro_batches))
    assert simulation.ratio == pytest.approx(ratio, abs=0.012)
    assert simulation.ratio <= 1.04 * simulation.lower_bound
    stored = Simulation(choose_schedule(Mode.CLM, costs, micro_batches))
    assert stored.ratio == stored.lower_bound == pytest.approx((1 + 2 * 0.68) / 3, abs=1e-3)
