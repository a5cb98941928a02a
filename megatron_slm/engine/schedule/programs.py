"""Pipeline schedules as data: the instructions of every stage, in order. Pure; no processes, no tensors.

A schedule is made in three steps.

1. *Order* (`orders.py`): each stage's computations (model forward, model backward, reference forward) in the
   order it runs them. This is where modes differ.
2. *Time*: the orders are simulated with the stages' costs, in integer ticks, which gives one global order of
   all computations. (With float times two events that are meant to coincide can sort differently from their
   cause, and the projected programs deadlock.)
3. *Projection*: every message is one event at the end of the computation that produced it; both ends post it
   there, and the consumer waits for it when it needs it. Each stage's program is the projection of the one
   global order on that stage, so the programs cannot wait for each other in a circle, whether sends block
   until they are received or not.

A mode that works ahead needs two more programs than a step's: the *prologue*, which runs the reference on the
micro-batches that a step expects done (before the first step of a run and after a resume), and the *last*
step's, which does no work for a next step.
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
    """Kinds of instructions; values are the names of DeepSpeed's, as logs show them."""

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
    """One line of a stage's program. `micro_batch` counts from the step's first; -1 for instructions without one."""

    kind: Kind
    micro_batch: int = -1


Programs = tuple[tuple[Instruction, ...], ...]
"""Every stage's instructions, in order."""

_MESSAGES = {
    Work.FORWARD: (Kind.SEND_ACTIVATION, Kind.RECV_ACTIVATION),
    Work.BACKWARD: (Kind.SEND_GRADIENT, Kind.RECV_GRADIENT),
    Work.REFERENCE: (Kind.SEND_REFERENCE_ACTIVATION, Kind.RECV_REFERENCE_ACTIVATION),
}
_COMPUTE = {Work.FORWARD: Kind.FORWARD, Work.BACKWARD: Kind.BACKWARD, Work.REFERENCE: Kind.REFERENCE_FORWARD}
_LOAD = {Work.FORWARD: Kind.LOAD_MICRO_BATCH, Work.REFERENCE: Kind.LOAD_REFERENCE_MICRO_BATCH}


class Event(NamedTuple):
    """A computation in the global order, with its times in ticks from the start of the step."""

    start: int
    end: int
    stage: int
    computation: Computation


class _On(NamedTuple):
    """A computation on one stage."""

    computation: Computation
    stage: int


def _inputs(computation: Computation, stage: int, num_stages: int, *, has_reference: bool) -> list[_On]:
    """Computations whose end this one waits for, beside those before it on its own stage."""
    if computation.work is Work.BACKWARD:
        return [_On(computation, stage + 1)] if stage < num_stages - 1 else []
    inputs = [_On(computation, stage - 1)] if stage > 0 else []
    if has_reference and computation.work is Work.FORWARD and stage == num_stages - 1:
        inputs.append(_On(Computation(Work.REFERENCE, computation.micro_batch), stage))
    return inputs


def _reads(computation: Computation, stage: int, num_stages: int, max_unread: int) -> list[_On]:
    """Computations of the next stage that must have begun before it is sent another reference result."""
    if computation.work is not Work.REFERENCE or stage == num_stages - 1 or computation.micro_batch < max_unread:
        return []
    return [_On(Computation(Work.REFERENCE, computation.micro_batch - max_unread), stage + 1)]


def play(orders: Orders, costs: Costs, leads: Sequence[int] | None = None) -> list[Event]:
    """Simulate the stages' orders; return the events by start and stage.

    No stage has more than `costs.max_unread` reference results that the next one has not begun to read.

    Args:
        leads: reference forwards that each stage has done beforehand; None where there is no reference.

    Raises:
        ValueError: the orders wait for each other in a circle.
    """
    num_stages = len(orders)
    finished = {
        _On(Computation(Work.REFERENCE, i), stage): 0 for stage, lead in enumerate(leads or ()) for i in range(lead)
    }
    begun = dict(finished)
    clock, position = [0] * num_stages, [0] * num_stages
    events: list[Event] = []
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                this = _On(order[position[stage]], stage)
                inputs = _inputs(*this, num_stages, has_reference=leads is not None)
                reads = _reads(*this, num_stages, costs.max_unread)
                if not (finished.keys() >= set(inputs) and begun.keys() >= set(reads)):
                    break
                start = max([clock[stage], *(finished[x] for x in inputs), *(begun[x] for x in reads)])
                end = start + costs.of(this.computation.work)[stage]
                events.append(Event(start, end, stage, this.computation))
                begun[this] = start
                finished[this] = clock[stage] = end
                position[stage] += 1
                moved = True
    if any(at < len(order) for at, order in zip(position, orders, strict=True)):
        raise ValueError(f"the orders of the stages wait for each other in a circle at {position}")
    return sorted(events, key=lambda event: (event.start, event.stage))


class _Placed(NamedTuple):
    """An instruction of one stage, placed in the global order by `at`."""

    at: tuple[int, int, int]
    """Tick; messages (0) before computations (1) of the same tick; number of the event they come from."""
    stage: int
    instruction: Instruction


def project(events: list[Event], num_stages: int) -> list[list[Instruction]]:
    """Cut the global order into a program a stage: computations at their start, messages at their producer's end."""
    placed: list[_Placed] = []
    for number, (start, end, stage, (work, i)) in enumerate(events):
        starts, ends = (start, 1, number), (end, 0, number)
        if stage in (0, num_stages - 1) and work in _LOAD:
            placed.append(_Placed(starts, stage, Instruction(_LOAD[work], i)))
        placed.append(_Placed(starts, stage, Instruction(_COMPUTE[work], i)))
        receiver = stage - 1 if work is Work.BACKWARD else stage + 1
        if 0 <= receiver < num_stages:
            send, receive = _MESSAGES[work]
            placed.append(_Placed(ends, stage, Instruction(send, i)))
            placed.append(_Placed(ends, receiver, Instruction(receive, i)))
    placed.sort(key=lambda entry: entry.at)
    return [[entry.instruction for entry in placed if entry.stage == stage] for stage in range(num_stages)]


def makespan(events: list[Event]) -> int:
    """Return the ticks from the start of the first computation to the end of the last one."""
    return max(event.end for event in events)


_END_OF_STEP = tuple(
    Instruction(kind) for kind in (Kind.REDUCE_TIED_GRADIENTS, Kind.REDUCE_GRADIENTS, Kind.OPTIMIZER_STEP)
)


def _programs(events: list[Event], num_stages: int, end: tuple[Instruction, ...] = ()) -> Programs:
    return tuple((*program, *end) for program in project(events, num_stages))


@dataclass(frozen=True)
class Schedule:
    """The order of work of all stages in every step. It follows from its fields alone, so every rank has the same."""

    mode: Mode
    costs: Costs
    num_micro_batches: int
    leads: tuple[int, ...] | None
    """Micro-batches of the next step that each stage's reference has done at the end of a step; None without a
    reference."""
    orders: Orders

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.orders)

    @cached_property
    def events(self) -> list[Event]:
        """Events of a step in the middle of a run."""
        return play(self.orders, self.costs, self.leads)

    @cached_property
    def step(self) -> Programs:
        """Programs of a step that another one follows."""
        return _programs(self.events, self.num_stages, _END_OF_STEP)

    @cached_property
    def last(self) -> Programs:
        """Programs of a step that none follows."""
        orders = without_next_step(self.orders, self.num_micro_batches)
        return _programs(play(orders, self.costs, self.leads), self.num_stages, _END_OF_STEP)

    @cached_property
    def prologue(self) -> Programs:
        """Programs of the work that the step before would have done ahead; empty without such work."""
        nothing = [0] * self.num_stages
        orders = reference_orders(nothing, self.leads or nothing)
        return _programs(play(orders, self.costs, nothing), self.num_stages)


def clm(costs: Costs, num_micro_batches: int) -> Schedule:
    """Schedule the model alone."""
    return Schedule(Mode.CLM, costs, num_micro_batches, None, model_orders(costs.num_stages, num_micro_batches))


def ride_along(costs: Costs, num_micro_batches: int) -> Schedule:
    """Schedule the reference right before the model: the plainest mode, which the others are compared with."""
    orders = ride_along_orders(costs.num_stages, num_micro_batches)
    return Schedule(Mode.RIDE_ALONG, costs, num_micro_batches, (0,) * costs.num_stages, orders)


def sequential(costs: Costs, num_micro_batches: int) -> Schedule:
    """Schedule all of the step's reference, then the model."""
    orders = sequential_orders(costs.num_stages, num_micro_batches)
    return Schedule(Mode.SEQUENTIAL, costs, num_micro_batches, (0,) * costs.num_stages, orders)


@lru_cache(maxsize=16)
def forward_programs(work: Work, num_stages: int, num_micro_batches: int) -> Programs:
    """Return the programs of forward passes alone, of the model or of the reference."""
    orders = [[Computation(work, i) for i in range(num_micro_batches)] for _ in range(num_stages)]
    return _programs(play(orders, Costs.uniform(num_stages)), num_stages)
