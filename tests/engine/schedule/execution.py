"""Programs run as data, by what a message can mean: handed over, buffered, or buffered up to a number."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_slm.engine.schedule.programs import Instruction, Kind, Schedule

NEXT = {Kind.SEND_ACTIVATION: Kind.RECV_ACTIVATION, Kind.SEND_REFERENCE_ACTIVATION: Kind.RECV_REFERENCE_ACTIVATION}
PREVIOUS = {Kind.SEND_GRADIENT: Kind.RECV_GRADIENT}
RECEIVES = {*NEXT.values(), *PREVIOUS.values()}
CONSUMES = {
    Kind.FORWARD: Kind.RECV_ACTIVATION,
    Kind.BACKWARD: Kind.RECV_GRADIENT,
    Kind.REFERENCE_FORWARD: Kind.RECV_REFERENCE_ACTIVATION,
}


def peer_of(stage: int, kind: Kind) -> tuple[int, Kind]:
    return (stage + 1, NEXT[kind]) if kind in NEXT else (stage - 1, PREVIOUS[kind])


def run_of(schedule: Schedule, num_steps: int) -> list[list[Instruction]]:
    """A whole run as one program a stage: prologue, steps, last step; micro-batches counted from the run's first."""
    m = schedule.num_micro_batches
    programs = [list(program) for program in schedule.prologue]
    for step in range(num_steps):
        form = schedule.last if step == num_steps - 1 else schedule.step
        for program, of_step in zip(programs, form, strict=True):
            program += [Instruction(kind, i if i < 0 else i + step * m) for kind, i in of_step]
    return programs


def execute(programs: Sequence[Sequence[Instruction]], *, max_unmatched: int | None) -> list[tuple[int, Instruction]]:
    """Run the programs; raises if they wait for each other or a message is another one than its reader needs.

    Computations take their messages in the order of posting. The optimizer's step is a barrier.

    Args:
        max_unmatched: sends of a lane whose receive is not posted before a further one blocks; 0 is a rendezvous,
            None is no limit.
    """
    num_stages = len(programs)
    at = [0] * num_stages
    posted: dict[tuple[int, Kind], deque[int]] = {}
    sent: dict[tuple[int, Kind], deque[int]] = {}
    barriers = [0] * num_stages
    referenced: set[int] = set()
    trace = []

    def possible(stage: int, instruction: Instruction) -> bool:
        kind, i = instruction
        if kind in NEXT or kind in PREVIOUS:
            lane = peer_of(stage, kind)
            unmatched = len(sent.get(lane, ())) - len(posted.get(lane, ()))
            return max_unmatched is None or unmatched < max_unmatched or unmatched < 0
        if kind is Kind.OPTIMIZER_STEP:
            here = [programs[s][at[s]].kind if at[s] < len(programs[s]) else None for s in range(num_stages)]
            return all(
                passed > barriers[stage] or (passed == barriers[stage] and kind is Kind.OPTIMIZER_STEP)
                for passed, kind in zip(barriers, here, strict=True)
            )
        first = stage == (num_stages - 1 if kind is Kind.BACKWARD else 0)
        if kind in CONSUMES and not first:
            lane = (stage, CONSUMES[kind])
            if not posted.get(lane) or not sent.get(lane):
                return False
            assert posted[lane][0] == sent[lane][0] == i, "a message of another micro-batch"
        return True

    def perform(stage: int, instruction: Instruction) -> None:
        kind, i = instruction
        if kind in NEXT or kind in PREVIOUS:
            sent.setdefault(peer_of(stage, kind), deque()).append(i)
        elif kind in RECEIVES:
            posted.setdefault((stage, kind), deque()).append(i)
        elif kind is Kind.OPTIMIZER_STEP:
            barriers[stage] += 1
        elif kind in CONSUMES and stage != (num_stages - 1 if kind is Kind.BACKWARD else 0):
            posted[stage, CONSUMES[kind]].popleft()
            sent[stage, CONSUMES[kind]].popleft()
        if kind is Kind.REFERENCE_FORWARD and stage == num_stages - 1:
            referenced.add(i)
        if kind is Kind.FORWARD and stage == num_stages - 1 and has_reference:
            assert i in referenced, "the model's loss comes before the reference's"

    has_reference = any(x.kind is Kind.REFERENCE_FORWARD for program in programs for x in program)
    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while at[stage] < len(program) and possible(stage, program[at[stage]]):
                perform(stage, program[at[stage]])
                trace.append((stage, program[at[stage]]))
                at[stage] += 1
                moved = True
    assert all(a == len(p) for a, p in zip(at, programs, strict=True)), f"deadlock at {at}"
    assert not any(sent.values()), "messages nobody read"
    assert not any(posted.values()), "receives that nothing was sent for"
    return trace
