from __future__ import annotations

import pytest

from megatron_slm.selection.schedule import KeepSchedule


def ratios(steps: int, final: float, **options: object) -> list[float]:
    schedule = KeepSchedule(**options)  # type: ignore[arg-type]
    return [round(schedule.ratio(step, final), 6) for step in range(steps)]


def test_constant() -> None:
    assert ratios(3, 0.6) == [0.6] * 3
    assert ratios(4, 0.6, warmup_iters=2) == [1.0, 1.0, 0.6, 0.6]


def test_linear() -> None:
    assert ratios(7, 0.6, kind="linear", warmup_iters=1, decay_iters=4) == [1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.6]
    assert ratios(4, 0.6, kind="linear", decay_iters=2, start=0.2) == [0.2, 0.4, 0.6, 0.6]


def test_cosine() -> None:
    assert ratios(5, 0.5, kind="cosine", decay_iters=4) == [1.0, 0.926777, 0.75, 0.573223, 0.5]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_share_stays_between_its_ends(kind: str) -> None:
    values = ratios(40, 0.3, kind=kind, warmup_iters=5, decay_iters=20, start=0.9)
    assert values[:5] == [1.0] * 5
    assert all(0.3 <= value <= 0.9 for value in values[5:])
    assert values[5:] == sorted(values[5:], reverse=True)
    assert values[25:] == [0.3] * 15
