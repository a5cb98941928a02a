"""What is kept of each micro-batch, and the timers of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_slm.engine import timers
from megatron_slm.engine.diagnostics import StepDiagnostics
from megatron_slm.engine.timers import TIMERS, WORK, Timers
from megatron_slm.loss.sums import LossSums, SumLayout


def test_diagnostics_come_by_micro_batch_whatever_the_order_of_work() -> None:
    facts = StepDiagnostics()
    for i in (2, 0, 1):
        facts.add_sums(i, SumLayout().pack({"kept_loss": torch.tensor(float(i))}))
    facts.add_gradient(1, torch.tensor([[1.0, -3.0]]))
    facts.add_gradient(3, torch.tensor([[math.inf, -math.inf]], dtype=torch.bfloat16))
    assert [int(vector[0]) for vector in facts.sums_in_order] == [0, 1, 2]
    found = facts.read(SumLayout())
    assert [fact.micro_batch for fact in found] == [0, 1, 2, 3]
    assert [fact.gradient_is_finite for fact in found] == [None, True, None, False]
    assert [None if fact.sums is None else fact.sums.kept_loss for fact in found] == [0.0, 1.0, 2.0, None]
    assert isinstance(found[0].sums, LossSums)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_seen_by_the_hook(bad: float) -> None:
    facts, x = StepDiagnostics(), torch.zeros(7, 5, requires_grad=True)
    x.register_hook(facts.gradient_hook(4))
    gradient = torch.rand(7, 5)
    gradient[6, 2] = bad
    x.backward(gradient)
    (fact,) = facts.read(SumLayout())
    assert (fact.micro_batch, fact.gradient_is_finite) == (4, False)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_level_says_which_timers_run(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])
    running = Timers(level)
    for repeat in (1, 2):
        for name in TIMERS:
            with running.timing(name):
                now[0] += repeat
    with running.paused(), running.timing("optimizer"):
        now[0] += 100
    seconds = running.read()
    assert set(running.names) == {name for name, least in TIMERS.items() if least <= level}
    assert seconds == dict.fromkeys({*running.names, *WORK}, 3.0)
    assert running.read() == {}, "read once"


class FakeEvent:
    """A GPU's event: it has a time only once it was waited for."""

    clock, passed, waited = 0.0, 0.0, 0

    def __init__(self) -> None:
        self.time: float | None = None

    def record(self) -> None:
        FakeEvent.clock += 5.0
        self.time = FakeEvent.clock

    def query(self) -> bool:
        return self.time is not None and self.time <= FakeEvent.passed

    def synchronize(self) -> None:
        FakeEvent.passed = FakeEvent.clock
        FakeEvent.waited += 1

    def elapsed_time(self, other: Any) -> float:
        assert other.query(), "read before the device was waited for"
        return other.time - self.time


def test_a_gpu_is_waited_for_once_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "timing_event", FakeEvent)
    running = Timers(2)
    for _ in range(3):
        with running.timing("optimizer"):
            pass
    assert FakeEvent.waited == 0
    assert running.read() == {"optimizer": pytest.approx(0.015)}
    assert FakeEvent.waited == 1


def test_a_gpu_is_not_waited_for_while_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has passed is added up, and its events are let go; of the rest none is lost."""
    monkeypatch.setattr(timers, "timing_event", FakeEvent)
    monkeypatch.setattr(timers, "_MOST_PENDING", 4)
    running, FakeEvent.waited = Timers(2), 0
    for number in range(10):
        with running.timing("optimizer"):
            pass
        FakeEvent.passed = FakeEvent.clock - 20  # two intervals behind the host
        assert len(running._pending) <= 4 + 1, number
    assert FakeEvent.waited == 0
    assert running.read() == {"optimizer": pytest.approx(0.05)}
