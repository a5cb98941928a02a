"""Pipeline schedules as data: which instruction each stage runs when. Pure; no processes, no tensors.

A schedule is made in three steps.

1. *Order*: each stage's computations (model forward, model backward, reference forward) in the order it runs
   them. This is where modes differ.
2. *Time*: the orders are played through with the stages' costs, in integer ticks, which gives one global
   order of all computations. (With float times two events that are meant to coincide can sort differently
   from their cause, and the projected programs deadlock.)
3. *Projection*: every message is one event at the end of the computation that produced it; both ends post it
   there, and the consumer waits for it when it needs it. Each stage's program is the projection of the one
   global order on that stage, so the programs cannot wait for each other in a circle, whether sends block
   until they are received or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple

Mode = Literal["clm", "ride-along", "evaluate", "reference"]


class Work(Enum):
    """A kind of computation."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REFERENCE = "reference"


class Computation(NamedTuple):
    """One computation of one micro-batch on one stage."""

    work: Work
    micro_batch: int


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


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Relative duration of each computation on one stage, in ticks (integers of at least 1).

    The last stage also has the loss head. Only proportions matter; wrong ones cost time, never correctness.
    """

    forward: int = 1000
    backward: int = 2000
    reference: int = 1000
    head_forward: int = 0
    head_backward: int = 0
    head_reference: int = 0

    def ticks(self, work: Work, *, is_last: bool) -> int:
        """Duration on a stage."""
        base, head = {
            Work.FORWARD: (self.forward, self.head_forward),
            Work.BACKWARD: (self.backward, self.head_backward),
            Work.REFERENCE: (self.reference, self.head_reference),
        }[work]
        return base + head * is_last


_SEND = {
    Work.FORWARD: (Kind.SEND_ACTIVATION, Kind.RECV_ACTIVATION),
    Work.BACKWARD: (Kind.SEND_GRADIENT, Kind.RECV_GRADIENT),
    Work.REFERENCE: (Kind.SEND_REFERENCE_ACTIVATION, Kind.RECV_REFERENCE_ACTIVATION),
}
_COMPUTE = {Work.FORWARD: Kind.FORWARD, Work.BACKWARD: Kind.BACKWARD, Work.REFERENCE: Kind.REFERENCE_FORWARD}


def one_forward_one_backward(num_stages: int, num_micro_batches: int, stage: int) -> list[Computation]:
    """The model's order on one stage: a warm-up of forwards, then one of each, then the last backwards."""
    warm_up = min(num_stages - 1 - stage, num_micro_batches)
    order = [Computation(Work.FORWARD, i) for i in range(warm_up)]
    for i in range(num_micro_batches - warm_up):
        order += [Computation(Work.FORWARD, warm_up + i), Computation(Work.BACKWARD, i)]
    return order + [Computation(Work.BACKWARD, i) for i in range(num_micro_batches - warm_up, num_micro_batches)]


def stage_orders(mode: Mode, num_stages: int, num_micro_batches: int) -> list[list[Computation]]:
    """Every stage's computations in order.

    - `clm`: the model alone.
    - `ride-along`: the reference's forward of a micro-batch right before the model's; the plainest of all.
    - `evaluate`: the model's forwards alone.
    - `reference`: the reference's forwards alone.
    """
    if mode in ("evaluate", "reference"):
        work = Work.FORWARD if mode == "evaluate" else Work.REFERENCE
        return [[Computation(work, i) for i in range(num_micro_batches)] for _ in range(num_stages)]
    orders = [one_forward_one_backward(num_stages, num_micro_batches, stage) for stage in range(num_stages)]
    if mode == "ride-along":
        return [[c for item in order for c in _with_reference(item)] for order in orders]
    return orders


def _with_reference(item: Computation) -> list[Computation]:
    if item.work is Work.FORWARD:
        return [Computation(Work.REFERENCE, item.micro_batch), item]
    return [item]


class Event(NamedTuple):
    """A computation placed in the global order: ticks from the start of the step."""

    start: int
    end: int
    stage: int
    computation: Computation


def _inputs(item: Computation, stage: int, num_stages: int) -> list[tuple[Computation, int]]:
    """What a computation waits for: (computation, stage) pairs other than those before it on its own stage."""
    if item.work is Work.BACKWARD:
        return [(item, stage + 1)] if stage < num_stages - 1 else []
    return [(item, stage - 1)] if stage > 0 else []


def play(orders: list[list[Computation]], costs: Costs) -> list[Event]:
    """Play the stages' orders through; the events in order of (start, stage).

    Raises:
        ValueError: the orders wait for each other in a circle.
    """
    num_stages = len(orders)
    finished: dict[tuple[Computation, int], int] = {}
    clock, position = [0] * num_stages, [0] * num_stages
    events: list[Event] = []
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                item = order[position[stage]]
                inputs = _inputs(item, stage, num_stages)
                if any(key not in finished for key in inputs):
                    break
                start = max([clock[stage], *(finished[key] for key in inputs)])
                end = start + costs.ticks(item.work, is_last=stage == num_stages - 1)
                events.append(Event(start, end, stage, item))
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
        edge = stage in (0, num_stages - 1)
        if edge and item.work is Work.FORWARD:
            placed.append((start, 1, number, stage, Instruction(Kind.LOAD_MICRO_BATCH, item.micro_batch)))
        if edge and item.work is Work.REFERENCE:
            placed.append((start, 1, number, stage, Instruction(Kind.LOAD_REFERENCE_MICRO_BATCH, item.micro_batch)))
        placed.append((start, 1, number, stage, Instruction(_COMPUTE[item.work], item.micro_batch)))
        receiver = stage - 1 if item.work is Work.BACKWARD else stage + 1
        if 0 <= receiver < num_stages:
            send, receive = _SEND[item.work]
            placed.append((end, 0, number, stage, Instruction(send, item.micro_batch)))
            placed.append((end, 0, number, receiver, Instruction(receive, item.micro_batch)))
    placed.sort(key=lambda entry: entry[:3])
    return [[entry[4] for entry in placed if entry[3] == stage] for stage in range(num_stages)]


@lru_cache(maxsize=64)
def stage_programs(
    mode: Mode, num_stages: int, num_micro_batches: int, costs: Costs
) -> tuple[tuple[Instruction, ...], ...]:
    """The programs of all stages for one step. A pure function, so every rank derives the same ones."""
    programs = project(play(stage_orders(mode, num_stages, num_micro_batches), costs), num_stages)
    end = (
        []
        if mode in ("evaluate", "reference")
        else [Kind.REDUCE_TIED_GRADIENTS, Kind.REDUCE_GRADIENTS, Kind.OPTIMIZER_STEP]
    )
    return tuple((*program, *(Instruction(kind) for kind in end)) for program in programs)
