"""The lookahead: what is read ahead is found under its new number after a step."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.engine.lookahead import Lookahead
from megatron_slm.types import MicroBatch, TokenStatistics


def micro_batch(number: int) -> MicroBatch:
    tokens = torch.full((1, 4), number)
    return MicroBatch(tokens, tokens, tokens > 0, torch.tensor([number]))


def test_numbers_move_with_the_steps() -> None:
    lookahead = Lookahead()
    for i in range(4):
        lookahead.add(i, micro_batch(i))
        lookahead.add_reference(i, TokenStatistics(torch.full((4,), float(i))))
    for i in range(3):
        assert lookahead.take_reference(i) is not None
        assert lookahead.take_reference(i) is None, "once"
        lookahead.remove(i)
    lookahead.advance(3)
    assert 0 in lookahead
    assert 3 not in lookahead
    assert len(lookahead) == 1
    assert lookahead.batch(0).sample_b.tolist() == [3]
    reference = lookahead.take_reference(0)
    assert reference is not None
    assert reference.loss_N.tolist() == [3.0] * 4


def test_nothing_is_left_behind() -> None:
    lookahead = Lookahead()
    lookahead.add(0, micro_batch(0))
    with pytest.raises(AssertionError, match="not trained on"):
        lookahead.advance(2)
