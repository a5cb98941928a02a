"""The probe of the selection: when it runs, and what it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_slm.checkpoint.state import RunState
from megatron_slm.training.selection_probe import SelectionProbe, agreement


class Batch:
    """Stands for a `FixedBatch` of 2 samples of 3 tokens, on the last stage."""

    def __init__(self, *kept: list[list[bool]]) -> None:
        self.kept, self.num_reference_runs = list(kept), 0

    def run_reference(self) -> None:
        self.num_reference_runs += 1

    def measure(self, state: RunState, *, selects: bool) -> list[Any]:
        assert selects
        return [type("Probed", (), {"kept_bs": torch.tensor(self.kept.pop(0))})]

    def gather(self, parts_bs: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        (part_bs,) = parts_bs
        return part_bs.to(dtype)


def probe(batch: Batch, interval: int) -> SelectionProbe:
    return SelectionProbe(batch=batch, interval=interval)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "last", "runs"), [(0, 4, 0), (0, 5, 1), (5, 9, 0), (4, 5, 1), (5, 10, 1), (10, 10, 0)]
)
def test_the_reference_runs_only_if_a_probe_is_due(step: int, last: int, runs: int) -> None:
    batch = Batch()
    selection = probe(batch, 5)
    selection.prepare(step, last)
    assert batch.num_reference_runs == runs
    assert any(selection.is_due(after) for after in range(step + 1, last + 1)) == bool(runs)


def test_each_probe_is_compared_with_the_one_before() -> None:
    state = RunState()
    selection = probe(Batch([[True, True, False], [False] * 3], [[True, False, False], [True, False, False]]), 1)
    assert selection.measure(state) == (2, None)
    assert selection.measure(state) == (2, 1 / 3)
    assert state.probe_kept is not None
    assert state.probe_kept.tolist() == [[True, False, False], [True, False, False]]


def test_agreement() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert agreement(a, a) == 1.0
    assert agreement(a, b) == 0.5
    assert agreement(None, a) is None
    assert agreement(a, torch.tensor([True])) is None, "another batch"
    assert agreement(~a & a, b & ~b) is None, "both are empty"
