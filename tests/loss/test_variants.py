"""The choice of what is kept between the passes: never beyond the budget, and as the table of costs says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.loss.prediction import ThresholdPredictor
from megatron_slm.loss.stash import Stash
from megatron_slm.loss.variants import CHUNK_ROWS, LossHead


def stash_bytes(stash: Stash) -> int:
    return sum(t.numel() * t.element_size() for t in [*stash._blocks, *stash._scratch] if t is not None)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 9000),
    st.floats(0.01, 1.0),
    st.integers(0, 2**25),
    st.sampled_from(["auto", "recompute", "stash", "predictive"]),
    st.sampled_from(["auto", "fp32", "bf16"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_never_more_than_the_budget(
    rows: int, columns: int, keep: float, budget: int, variant: Any, stash_dtype: Any, dtype: torch.dtype
) -> None:
    head = LossHead(variant=variant, stash_bytes=budget, stash_dtype=stash_dtype)
    plan = head.plan(rows, columns, keep, dtype)
    hidden, weight = torch.empty(rows, 1, dtype=dtype, device="meta"), torch.empty(columns, 1, device="meta")
    stash = plan.stash(hidden, weight)
    assert (stash_bytes(stash) if stash else 0) <= budget
    assert 1 <= plan.chunk_rows <= rows
    assert plan.capacity <= rows
    assert (stash is None) == (plan.variant == "recompute")


@pytest.mark.parametrize(
    ("keep", "budget_rows", "variant"),
    [
        (0.6, 4096, "stash"),
        (1.0, 4096, "stash"),
        (0.6, 4095, "predictive"),
        (0.6, 2868 + CHUNK_ROWS, "predictive"),
        (0.6, 2867 + CHUNK_ROWS, "recompute"),
        (0.6, 0, "recompute"),
        (0.7, 2000, "predictive"),  # from 2/3 on recomputing costs more than full logits
        (1.0, 2000, "predictive"),
        (1.0, 0, "recompute"),
    ],
)
def test_auto(keep: float, budget_rows: int, variant: str) -> None:
    head = LossHead(stash_bytes=budget_rows * 32000 * 2)
    assert head.plan(4096, 32000, keep, torch.bfloat16).variant == variant


def test_dtype_of_the_stash() -> None:
    assert LossHead().plan(8, 8, 1.0, torch.float32).dtype == torch.float32
    assert LossHead().plan(8, 8, 1.0, torch.bfloat16).dtype == torch.bfloat16
    assert LossHead(stash_dtype="bf16").plan(8, 8, 1.0, torch.float32).dtype == torch.bfloat16
    assert LossHead(stash_dtype="fp32").plan(8, 8, 1.0, torch.bfloat16).dtype == torch.float32


def test_predictor_expects_the_last_micro_batch_again() -> None:
    predictor, valid = ThresholdPredictor(), torch.ones(100, dtype=torch.bool)
    valid[0] = False
    assert predictor.predict(torch.zeros(3)) is None
    score = torch.arange(100.0)
    score[0] = 1e9  # not valid, so it does not count
    predictor.learn(score, valid, num_kept=60)
    predicted = predictor.predict(torch.arange(100.0))
    assert predicted is not None
    assert predicted.nonzero().squeeze(1).tolist() == list(range(35, 100))  # 60 kept, and a band of 5 of 99
    predictor.learn(score, torch.zeros_like(valid), num_kept=0)  # nothing to learn from
    assert predictor.predict(score) is not None
