"""The controller of the blocks' shares, and what a step's draws are keyed by."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_slm.config.backward import BackwardConfig
from megatron_slm.engine.rows import RowSampler, RowSums
from megatron_slm.loss.objective import StepSettings
from megatron_slm.selection.scores import score_named
from megatron_slm.selection.selector import Selector


def sampler(**changes: Any) -> RowSampler:
    values: dict[str, Any] = {
        "config": BackwardConfig(backward_rows="sampled", backward_row_variance=0.02),
        "selector": Selector(),
        "seed": 7,
        "num_blocks": 3,
        "num_samples": 2,
        "length": 8,
        "data_rank": 0,
        "data_size": 1,
        "counts_here": True,
    }
    return RowSampler(**{**values, **changes})


def sums(*blocks: tuple[float, float]) -> RowSums:
    """Of blocks with these variances, now and with a sixteenth less."""
    now, fewer = zip(*blocks, strict=True)
    ones = (2.0,) * len(blocks)
    return RowSums((0.5,) * len(blocks), tuple(2 * x for x in now), tuple(2 * x for x in fewer), ones)


def test_each_block_takes_a_sixteenth_more_or_less_or_stays() -> None:
    rows = sampler(num_blocks=5)
    measured = sums((0.03, 0.05), (0.01, 0.03), (0.005, 0.015), (0.02, 0.02), (math.nan, math.nan))
    assert rows.next_shares([10, 10, 10, 10, 10], measured) == [11, 10, 9, 9, 10]


def test_shares_stay_within_their_range() -> None:
    config = BackwardConfig(backward_rows="sampled", backward_row_variance=0.02, backward_row_share_range=[0.5, 0.8])
    rows = sampler(config=config, num_blocks=2)
    assert rows.first_shares([]) == [12, 12]
    assert rows.first_shares([16, 3]) == [12, 8], "a checkpoint of another range"
    assert rows.first_shares([9]) == [12, 12], "of another model"
    assert rows.next_shares([12, 8], sums((0.5, 0.9), (0.0, 0.0))) == [12, 8]


def test_a_fixed_share_has_no_controller() -> None:
    rows = sampler(config=BackwardConfig(backward_rows="sampled", backward_row_share=0.7))
    assert rows.first_shares([]) == []
    assert rows.next_shares([], sums((0.5, 0.9))) == []
    assert rows.of_micro_batch(0, StepSettings(step=0)).share(1) == 0.7


def test_the_controller_settles_where_the_variance_is_allowed() -> None:
    """On gradients whose norms fall off, over steps that differ a little."""
    rows, shares = sampler(num_blocks=1), [16]
    variances = []
    for step in range(40):
        settings = StepSettings(step=step, row_shares=tuple(shares))
        torch.manual_seed(step)
        norm_N = torch.rand(256).pow(3)
        rows.of_micro_batch(0, settings).draw(norm_N, block=0, part=0)
        rows.read(rows.take_table(torch.device("cpu")).tolist())
        assert rows.last is not None
        assert rows.last.rows == (shares[0] / 16,)
        variances += rows.last.variances
        shares = rows.next_shares(shares, rows.last)
    assert 0.005 < sum(variances[20:]) / 20 < 0.025
    assert 8 < shares[0] < 14
    assert len({round(v, 6) for v in variances[20:]}) > 5


def test_draws_do_not_depend_on_the_layout_and_differ_between_micro_batches() -> None:
    settings = StepSettings(step=3, row_shares=(8, 8, 8))
    alone = [sampler().of_micro_batch(i, settings).key for i in range(4)]
    parallel = [sampler(data_rank=i % 2, data_size=2).of_micro_batch(i // 2, settings).key for i in range(4)]
    assert alone == parallel
    assert len(set(alone)) == 4
    assert sampler().of_micro_batch(0, StepSettings(step=4, row_shares=(8, 8, 8))).key not in alone


def test_sums_are_taken_in_the_order_of_the_micro_batches() -> None:
    """Their bits do not depend on the order in which a schedule runs backward passes."""
    tables = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        rows = sampler(num_blocks=1)
        settings = StepSettings(step=0, row_shares=(8,))
        passes = {i: rows.of_micro_batch(i, settings) for i in order}
        for i in order:
            torch.manual_seed(i)
            passes[i].draw(torch.rand(50) ** 4, block=0, part=0)
        tables.append(rows.take_table(torch.device("cpu")))
        assert not rows.take_table(torch.device("cpu")).any(), "the next step starts anew"
    assert torch.equal(*tables)
    silent = sampler(counts_here=False)
    silent.of_micro_batch(0, StepSettings(step=0, row_shares=(8, 8, 8))).draw(torch.rand(9), block=0, part=0)
    assert not silent.take_table(torch.device("cpu")).any()


def test_the_last_block_takes_no_more_rows_than_tokens_are_kept() -> None:
    """No other row of it has a gradient, so that it is exact all the same."""
    config = BackwardConfig(backward_rows="sampled", backward_row_share=0.7)
    selector = Selector(scores=(score_named("loss"),), keep_ratio=0.5)
    rows = sampler(config=config, selector=selector).of_micro_batch(0, StepSettings(step=0))
    norm_N = torch.arange(16.0).sub(7).clamp(min=0)
    counts = [len(rows.draw(norm_N, block=block, part=0).row_M) for block in range(3)]
    assert counts == [12, 12, 8]
    drawn = rows.draw(norm_N, block=2, part=0)
    assert drawn.row_M.tolist() == list(range(8, 16))
    assert drawn.weight_M.tolist() == [1.0] * 8
    assert rows.measured[2][0] == 0.5
    measured = rows.measured[2][1]
    assert measured is not None
    assert measured.added == measured.added_if_fewer == 0, "of 0.7 and a sixteenth less"
    everything = sampler(config=config).of_micro_batch(0, StepSettings(step=0))
    assert len(everything.draw(norm_N, block=2, part=0).row_M) == 12, "nothing bounds the kept tokens"


def test_the_last_block_is_sampled_below_the_kept_share() -> None:
    selector = Selector(scores=(score_named("loss"),), keep_ratio=0.5)
    rows = sampler(selector=selector).of_micro_batch(0, StepSettings(step=0, row_shares=(9, 9, 9)))
    norm_N = torch.arange(16.0).sub(7).clamp(min=0)
    assert len(rows.draw(norm_N, block=2, part=0).row_M) == 8
    measured = rows.measured[2][1]
    assert measured is not None
    assert measured.added == measured.added_if_fewer == 0, "8 rows are enough"
    rows = sampler(selector=selector).of_micro_batch(0, StepSettings(step=0, row_shares=(8, 8, 8)))
    assert len(rows.draw(norm_N, block=2, part=0).row_M) == 8
    measured = rows.measured[2][1]
    assert measured is not None
    assert measured.added == 0 < measured.added_if_fewer
