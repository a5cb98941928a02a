"""No schedule makes GPUs wait for each other in a circle, however little room they have for messages' kernels."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from megatron_slm.engine.schedule.costs import Costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.programs import Instruction, Kind, Schedule
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.parallel.channels import Channel
from tests.engine.schedule.device_order import Devices, parts_of

MODES = tuple(Mode)
PLACES = (1, 2, 3, 4, 5, 6)


def costs(num_stages: int, kind: str, seed: int) -> Costs:
    draw = random.Random(seed)
    if kind == "uniform":
        return Costs.uniform(num_stages)
    if kind == "head":
        return Costs.uniform(num_stages, head_forward=0.6, head_backward=0.8, head_reference=0.6)
    return Costs.scaled(*[[draw.uniform(0.3, 3) for _ in range(num_stages)] for _ in range(3)])


def schedule(mode: Mode, num_stages: int, num_micro_batches: int, kind: str = "uniform", seed: int = 0) -> Schedule:
    return choose_schedule(mode, costs(num_stages, kind, seed), num_micro_batches, max_computations=20_000)


def check(mode: Mode, num_stages: int, num_micro_batches: int, kind: str, seed: int) -> None:
    for receive_early in (True, False):
        devices = Devices(
            parts_of(schedule(mode, num_stages, num_micro_batches, kind, seed)), receive_early=receive_early
        )
        assert devices.blocking() is None
        for places, slow in product(PLACES, (False, True)):
            assert devices.run(places, slow=slow) is None, (num_stages, num_micro_batches, kind, seed, places, slow)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 1), (2, 4), (3, 5), (4, 8)])
def test_no_circle(mode: Mode, num_stages: int, num_micro_batches: int) -> None:
    """Hosts that block at every message, and 1 to 6 kernels at once on each device."""
    for kind in ("uniform", "head", "random"):
        check(mode, num_stages, num_micro_batches, kind, 3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 4, 8, 13, 32])
def test_no_circle_in_many(mode: Mode, num_stages: int, num_micro_batches: int) -> None:
    for seed in range(3):
        for kind in ("uniform", "head", "random"):
            check(mode, num_stages, num_micro_batches, kind, seed)


@pytest.mark.parametrize("mode", MODES)
def test_any_order_of_starting_with_six_places(mode: Mode) -> None:
    """Hardware that starts what it likes: six places are one for each neighbour and lane, and nothing can be in the way."""
    draw = random.Random(0)
    devices = Devices(parts_of(schedule(mode, 4, 8, "random")))
    for choose in (max, draw.choice, draw.choice):
        assert devices.run(6, choose) is None


def test_a_receive_arrives_beside_a_computation() -> None:
    """A receive's kernel may start before the computation that was issued before it; a send's may not."""
    late, early = (Devices(parts_of(schedule(Mode.CLM, 4, 8)), receive_early=early) for early in (False, True))
    sooner = [a.after - b.after for a, b in zip(late.messages, early.messages, strict=True)]
    assert min(sooner) == 0
    assert sum(x > 0 for x in sooner) > len(sooner) / 5
    assert max(sooner) <= 2, "no earlier than the computation that runs: its kernel would wait on the device"


def swapped(of: Schedule, stage: int, first: Kind, second: Kind) -> list[Any]:
    """The parts of a run in which a stage issues two messages of different lanes the other way round, once."""
    parts = [list(map(list, part)) for part in parts_of(of)]
    program: list[Instruction] = parts[1][stage]
    at = next(i for i in range(len(program) - 1) if {program[i].kind, program[i + 1].kind} == {first, second})
    program[at], program[at + 1] = program[at + 1], program[at]
    return parts


def test_a_planted_order_is_found() -> None:
    """A stage that sends before it takes what its neighbour sends at that moment: both wait, where hosts block."""
    of = schedule(Mode.CLM, 3, 8)
    found = []
    for stage in (0, 1, 2):
        for first, second in ((Kind.SEND_ACTIVATION, Kind.RECV_GRADIENT), (Kind.RECV_ACTIVATION, Kind.SEND_GRADIENT)):
            try:
                parts = swapped(of, stage, first, second)
            except StopIteration:
                continue
            devices = Devices(parts)
            found.append((devices.blocking(), devices.run(1)))
    assert any(blocking and "stuck at" in blocking for blocking, _ in found)
    assert any(running and "kernels running" in running for _, running in found)


def test_receives_that_overtake_sends_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receive that may start before a send that was issued first takes the one place, and waits there for ever."""
    real = Channel.send

    def unmarked(self: Channel, x: Any) -> None:
        mark = self.beside.mark
        self.beside.mark = lambda: None  # type: ignore[method-assign]
        real(self, x)
        self.beside.mark = mark  # type: ignore[method-assign]

    monkeypatch.setattr(Channel, "send", unmarked)
    stuck = [
        Devices(parts_of(schedule(mode, 4, 8, "random", seed))).run(1, slow=True) for mode in MODES for seed in range(3)
    ]
    assert any(stuck)
