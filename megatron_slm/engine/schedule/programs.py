"""Pipeline schedules as data: which instruction each stage runs when. Pure; no processes, no tensors.

A schedule is made in three steps.

1. *Order* (`orders.py`): each stage's computations (model forward, model backward, reference forward) in the
   order it runs them. This is where modes differ.
2. *Time*: the orders are played through with the stages' costs, in integer ticks, which gives one global
   order of all computations. (With float times two events that are meant to coincide can sort differently
   from their cause, and the projected programs deadlock.)
3. *Projection*: every message is one event at the end of the computation that produced it; both ends post it
   there, and the consumer waits for it when it needs it. Each stage's program is the projection of the one
   global order on that stage, so the programs cannot wait for each other in a circle, whether sends block
   until they are received or not.

A mode that works ahead needs two more programs than that of a step: the *prologue*, which brings the
reference to where a step expects it (before the first step of a run and after a resume), and the *last*
step's, which does no work for a step that will not come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import NamedTuple

from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.orders import (
    Computation,
    Orders,
    model_orders,
    reference_orders,
    ride_along_orders,
    sequential_orders,
    without_next_step,
)


class Kind(Enum):
    """What a stage is told to do."""

    LOAD_MICRO_BATCH = "LoadMicroBatch"
    FORWARD = "ForwardPass"
    BACKWARD = "BackwardPass"
    SEND_ACTIVATION = "SendActivation"
    RECV_ACTIVATION = "RecvActivation"
    SEND_GRADIENT = "SendGrad"
    RECV_GRADIENT = "RecvGrad"
    LOAD_REFERENCE_MICRO_BATCH = "LoadReferenceMicroBatch"
    REFERENCE_FORWARD = "ReferenceForward"
    SEND_REFERENCE_ACTIVATION = "SendReferenceActivation"
    RECV_REFERENCE_ACTIVATION = "RecvReferenceActivation"
    REDUCE_TIED_GRADIENTS = "ReduceTiedGrads"
    REDUCE_GRADIENTS = "ReduceGrads"
    OPTIMIZER_STEP = "OptimizerStep"


class Instruction(NamedTuple):
    """One line of a stage's program. `micro_batch` counts from the step's first; -1 where it has no meaning."""

    kind: Kind
    micro_batch: int = -1


Programs = tuple[tuple[Instruction, ...], ...]
"""Every stage's instructions, in order."""

_SEND = {
    Work.FORWARD: (Kind.SEND_ACTIVATION, Kind.RECV_ACTIVATION),
    Work.BACKWARD: (Kind.SEND_GRADIENT, Kind.RECV_GRADIENT),
    Work.REFERENCE: (Kind.SEND_REFERENCE_ACTIVATION, Kind.RECV_REFERENCE_ACTIVATION),
}
_COMPUTE = {Work.FORWARD: Kind.FORWARD, Work.BACKWARD: Kind.BACKWARD, Work.REFERENCE: Kind.REFERENCE_FORWARD}
_LOAD = {Work.FORWARD: Kind.LOAD_MICRO_BATCH, Work.REFERENCE: Kind.LOAD_REFERENCE_MICRO_BATCH}


class Event(NamedTuple):
    """A computation placed in the global order: ticks from the start of the step."""

    start: int
    end: int
    stage: int
    computation: Computation


def _inputs(item: Computation, stage: int, num_stages: int, has_reference: bool) -> list[tuple[Computation, int]]:
    """What a computation waits for: (computation, stage) pairs other than those before it on its own stage."""
    if item.work is Work.BACKWARD:
        return [(item, stage + 1)] if stage < num_stages - 1 else []
    inputs = [(item, stage - 1)] if stage > 0 else []
    if has_reference and item.work is Work.FORWARD and stage == num_stages - 1:
        inputs.append((Computation(Work.REFERENCE, item.micro_batch), stage))
    return inputs


def _room(item: Computation, stage: int, num_stages: int, max_unread: int) -> list[tuple[Computation, int]]:
    """What the next stage must have begun before another reference result is made for it."""
    if item.work is not Work.REFERENCE or stage == num_stages - 1 or item.micro_batch < max_unread:
        return []
    return [(Computation(Work.REFERENCE, item.micro_batch - max_unread), stage + 1)]


def play(orders: Orders, costs: Costs, leads: Sequence[int] | None = None) -> list[Event]:
    """Play the stages' orders through; the events in order of (start, stage).

    No stage has more than `costs.max_unread` reference results that the next one has not begun to read.

    Args:
        leads: how far the reference has come on each stage beforehand; None where there is no reference.

    Raises:
        ValueError: the orders wait for each other in a circle.
    """
    num_stages = len(orders)
    finished: dict[tuple[Computation, int], int] = {}
    for stage, lead in enumerate(leads or ()):
        finished.update(((Computation(Work.REFERENCE, i), stage), 0) for i in range(lead))
    begun: dict[tuple[Computation, int], int] = dict(finished)
    clock, position = [0] * num_stages, [0] * num_stages
    events: list[Event] = []
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                item = order[position[stage]]
                inputs = _inputs(item, stage, num_stages, leads is not None)
                room = _room(item, stage, num_stages, costs.max_unread)
                if any(key not in finished for key in inputs) or any(key not in begun for key in room):
                    break
                start = max([clock[stage], *(finished[key] for key in inputs), *(begun[key] for key in room)])
                end = start + costs.of(item.work)[stage]
                events.append(Event(start, end, stage, item))
                begun[item, stage] = start
                finished[item, stage] = clock[stage] = end
                position[stage] += 1
                moved = True
    if any(at < len(order) for at, order in zip(position, orders, strict=True)):
        raise ValueError(f"the orders of the stages wait for each other in a circle at {position}")
    return sorted(events, key=lambda event: (event.start, event.stage))


def project(events: list[Event], num_stages: int) -> list[list[Instruction]]:
    """Each stage's program: computations where they start, messages where the producing computation ends."""
    placed: list[tuple[int, int, int, int, Instruction]] = []  # (tick, rank of a tie, serial number, stage, what)
    for number, (start, end, stage, item) in enumerate(events):
        if stage in (0, num_stages - 1) and item.work in _LOAD:
            placed.append((start, 1, number, stage, Instruction(_LOAD[item.work], item.micro_batch)))
        placed.append((start, 1, number, stage, Instruction(_COMPUTE[item.work], item.micro_batch)))
        receiver = stage - 1 if item.work is Work.BACKWARD else stage + 1
        if 0 <= receiver < num_stages:
            send, receive = _SEND[item.work]
            placed.append((end, 0, number, stage, Instruction(send, item.micro_batch)))
            placed.append((end, 0, number, receiver, Instruction(receive, item.micro_batch)))
    placed.sort(key=lambda entry: entry[:3])
    return [[entry[4] for entry in placed if entry[3] == stage] for stage in range(num_stages)]


def makespan(events: list[Event]) -> int:
    """Ticks from the start of the first computation to the end of the last one."""
    return max(event.end for event in events)


_END_OF_STEP = tuple(
    Instruction(kind) for kind in (Kind.REDUCE_TIED_GRADIENTS, Kind.REDUCE_GRADIENTS, Kind.OPTIMIZER_STEP)
)


def _programs(events: list[Event], num_stages: int, end: tuple[Instruction, ...] = ()) -> Programs:
    return tuple((*program, *end) for program in project(events, num_stages))


@dataclass(frozen=True)
class Schedule:
    """The order of work of all stages in every step, as a function of its fields only: every rank has the same.

    `leads` are the micro-batches of the next step that each stage's reference has done at the end of a step;
    None where there is no reference.
    """

    mode: Mode
    costs: Costs
    num_micro_batches: int
    leads: tuple[int, ...] | None
    orders: Orders

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.orders)

    @cached_property
    def events(self) -> list[Event]:
        """A step in the middle of a run, played through."""
        return play(self.orders, self.costs, self.leads)

    @cached_property
    def step(self) -> Programs:
        """The programs of a step that another one follows."""
        return _programs(self.events, self.num_stages, _END_OF_STEP)

    @cached_property
    def last(self) -> Programs:
        """The programs of a step that none follows."""
        orders = without_next_step(self.orders, self.num_micro_batches)
        return _programs(play(orders, self.costs, self.leads), self.num_stages, _END_OF_STEP)

    @cached_property
    def prologue(self) -> Programs:
        """The programs that do what the step before would have done ahead; empty where that is nothing."""
        nothing = [0] * self.num_stages
        orders = reference_orders(nothing, self.leads or nothing)
        return _programs(play(orders, self.costs, nothing), self.num_stages)


def clm(costs: Costs, num_micro_batches: int) -> Schedule:
    """The model alone."""
    return Schedule(Mode.CLM, costs, num_micro_batches, None, model_orders(costs.num_stages, num_micro_batches))


def ride_along(costs: Costs, num_micro_batches: int) -> Schedule:
    """The reference right before the model: the plainest way, which all others are compared with."""
    orders = ride_along_orders(costs.num_stages, num_micro_batches)
    return Schedule(Mode.RIDE_ALONG, costs, num_micro_batches, (0,) * costs.num_stages, orders)


def sequential(costs: Costs, num_micro_batches: int) -> Schedule:
    """All of the step's reference, then the model."""
    orders = sequential_orders(costs.num_stages, num_micro_batches)
    return Schedule(Mode.SEQUENTIAL, costs, num_micro_batches, (0,) * costs.num_stages, orders)


@lru_cache(maxsize=16)
def forward_programs(work: Work, num_stages: int, num_micro_batches: int) -> Programs:
    """Forward passes alone, of the model or of the reference."""
    orders = [[Computation(work, i) for i in range(num_micro_batches)] for _ in range(num_stages)]
    return _programs(play(orders, Costs.uniform(num_stages)), num_stages)
