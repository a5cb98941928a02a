"""Sums go through one vector and come out under the names they went in with."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_slm.loss.sums import LossSums, SourceSums, SumLayout, evaluation_sums
from megatron_slm.types import MicroBatch, TokenStatistics

SCALARS = [f.name for f in fields(LossSums) if f.name != "by_source"]
BY_SOURCE = tuple(SourceSums(100.0 + i, 200.0 + i, 300.0 + i, 400.0 + i) for i in range(3))


def test_every_sum_comes_out_under_its_name() -> None:
    layout = SumLayout(3)
    sums = {name: torch.tensor(1.0 + i) for i, name in enumerate(SCALARS)}
    by_name = dict(reversed(sums.items()))  # the order of the values is the layout's business
    vector = layout.pack({"by_source": torch.tensor(BY_SOURCE), **by_name})
    assert vector.dtype == torch.float64
    assert len(vector) == layout.size == len(SCALARS) + 12
    assert layout.unpack(vector) == LossSums(**{name: float(x) for name, x in sums.items()}, by_source=BY_SOURCE)
    assert layout.unpack(2 * vector).by_source[1] == SourceSums(202.0, 402.0, 602.0, 802.0)


def test_one_corpus_has_no_sums_of_its_own() -> None:
    layout = SumLayout()
    vector = layout.pack({"divisor": torch.tensor(7)})
    assert len(vector) == len(SCALARS)
    assert layout.unpack(vector) == LossSums(divisor=7.0)


def test_a_sum_without_a_field_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"LossSums has no .'kept_los'"):
        SumLayout().pack({"kept_los": torch.tensor(1.0)})


def test_sums_add_up_by_name() -> None:
    one = LossSums(kept_loss=1.0, threshold=2.0, by_source=BY_SOURCE[:1])
    other = LossSums(kept_loss=0.5, divisor=4.0, by_source=BY_SOURCE[:2])
    expected = (SourceSums(200.0, 400.0, 600.0, 800.0), BY_SOURCE[1])
    assert one + other == LossSums(kept_loss=1.5, threshold=2.0, divisor=4.0, by_source=expected)


def test_an_evaluation_keeps_every_valid_token() -> None:
    valid = torch.tensor([[True, True, False]])
    batch = MicroBatch(valid.long(), valid.long(), valid, torch.arange(1))
    sums = evaluation_sums(TokenStatistics(torch.tensor([1.5, 2.0, 0.0])), batch)
    assert SumLayout(2).unpack(SumLayout(2).pack(sums)) == LossSums(
        kept_loss=3.5, kept_tokens=2.0, valid_loss=3.5, valid_tokens=2.0, by_source=(SourceSums(), SourceSums())
    )
