"""Schedules without processes: executed as data under both meanings a send can have."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.pipeline.schedule import (
    Computation,
    Costs,
    Instruction,
    Kind,
    Mode,
    Work,
    play,
    project,
    stage_orders,
    stage_programs,
)

NEXT = {Kind.SEND_ACTIVATION: Kind.RECV_ACTIVATION, Kind.SEND_REFERENCE_ACTIVATION: Kind.RECV_REFERENCE_ACTIVATION}
PREVIOUS = {Kind.SEND_GRADIENT: Kind.RECV_GRADIENT}
RECEIVES = {*NEXT.values(), *PREVIOUS.values()}
CONSUMES = {
    Kind.FORWARD: Kind.RECV_ACTIVATION,
    Kind.BACKWARD: Kind.RECV_GRADIENT,
    Kind.REFERENCE_FORWARD: Kind.RECV_REFERENCE_ACTIVATION,
}

costs = st.builds(
    Costs,
    forward=st.integers(1, 3000),
    backward=st.integers(1, 6000),
    reference=st.integers(1, 3000),
    head_forward=st.integers(0, 4000),
    head_backward=st.integers(0, 4000),
    head_reference=st.integers(0, 4000),
)


def peer_of(stage: int, kind: Kind) -> tuple[int, Kind]:
    return (stage + 1, NEXT[kind]) if kind in NEXT else (stage - 1, PREVIOUS[kind])


def execute(programs: tuple[tuple[Instruction, ...], ...], *, rendezvous: bool) -> list[tuple[int, Instruction]]:
    """Run the programs; raises if they wait for each other. Computations take their messages in order of posting."""
    num_stages = len(programs)
    at = [0] * num_stages
    posted: dict[tuple[int, Kind], deque[int]] = {}
    arrived: dict[tuple[int, Kind], deque[int]] = {}
    trace = []
    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while at[stage] < len(program):
                kind, i = instruction = program[at[stage]]
                needs = CONSUMES.get(kind)
                first = stage == (num_stages - 1 if kind is Kind.BACKWARD else 0)
                if kind in NEXT or kind in PREVIOUS:
                    peer = peer_of(stage, kind)
                    if rendezvous and not posted.get(peer):
                        break
                    if rendezvous:
                        assert posted[peer].popleft() == i, "messages of a lane cross"
                    arrived.setdefault(peer, deque()).append(i)
                elif kind in RECEIVES:
                    posted.setdefault((stage, kind), deque()).append(i)
                elif needs is not None and not first:
                    queue = arrived.get((stage, needs))
                    if not queue:
                        break
                    assert queue.popleft() == i, "a message of another micro-batch"
                trace.append((stage, instruction))
                at[stage] += 1
                moved = True
    assert all(a == len(p) for a, p in zip(at, programs, strict=True)), f"deadlock at {at}"
    assert not any(arrived.values()), "messages nobody read"
    return trace


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["clm", "ride-along", "evaluate"]), st.integers(1, 8), st.integers(1, 12), costs, st.booleans())
def test_programs_finish(mode: Mode, num_stages: int, num_micro_batches: int, cost: Costs, rendezvous: bool) -> None:
    programs = stage_programs(mode, num_stages, num_micro_batches, cost)
    trace = execute(programs, rendezvous=rendezvous)
    for stage in range(num_stages):
        done = Counter(kind for s, (kind, _) in trace if s == stage)
        assert done[Kind.FORWARD] == num_micro_batches
        assert done[Kind.BACKWARD] == (0 if mode == "evaluate" else num_micro_batches)
        assert done[Kind.REFERENCE_FORWARD] == (num_micro_batches if mode == "ride-along" else 0)


def test_ride_along_runs_the_reference_right_before_the_model() -> None:
    for program in stage_programs("ride-along", 3, 5, Costs()):
        work = [x for x in program if x.kind in CONSUMES]
        for before, after in pairwise(work):
            if after.kind is Kind.FORWARD:
                assert before == Instruction(Kind.REFERENCE_FORWARD, after.micro_batch)


def test_a_micro_batch_is_loaded_before_it_is_used_on_the_first_and_last_stage() -> None:
    programs = stage_programs("ride-along", 4, 6, Costs())
    for stage, program in enumerate(programs):
        loads = [x for x in program if x.kind is Kind.LOAD_MICRO_BATCH]
        assert len(loads) == (6 if stage in (0, 3) else 0)
        for load in loads:
            assert program.index(load) < program.index(Instruction(Kind.FORWARD, load.micro_batch))


def test_a_step_ends_with_reductions_and_the_optimizer_once() -> None:
    for program in stage_programs("clm", 2, 3, Costs()):
        assert [x.kind for x in program[-3:]] == [
            Kind.REDUCE_TIED_GRADIENTS,
            Kind.REDUCE_GRADIENTS,
            Kind.OPTIMIZER_STEP,
        ]


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 4), (4, 8), (4, 2), (8, 16)])
def test_makespan_is_that_of_one_forward_one_backward(num_stages: int, num_micro_batches: int) -> None:
    events = play(stage_orders("clm", num_stages, num_micro_batches), Costs(forward=1000, backward=2000))
    assert max(event.end for event in events) == 3000 * (num_micro_batches + num_stages - 1)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (4, 8), (4, 16)])
def test_riding_along_costs_up_to_a_third_more(num_stages: int, num_micro_batches: int) -> None:
    plain = max(event.end for event in play(stage_orders("clm", num_stages, num_micro_batches), Costs()))
    riding = max(event.end for event in play(stage_orders("ride-along", num_stages, num_micro_batches), Costs()))
    busiest = 4000 * num_micro_batches
    assert busiest < riding
    assert 1.2 < riding / plain <= 4 / 3


def test_the_model_order_is_deepspeeds() -> None:
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    for stage, program in enumerate(stage_programs("clm", 4, 9, Costs())):
        stock = [c for step in TrainSchedule(9, 4, stage) for c in step if isinstance(c, ForwardPass | BackwardPass)]
        ours = [x.kind for x in program if x.kind in (Kind.FORWARD, Kind.BACKWARD)]
        assert ours == [Kind.FORWARD if isinstance(c, ForwardPass) else Kind.BACKWARD for c in stock]


def test_orders_that_wait_for_each_other_are_refused() -> None:
    forward, backward = Computation(Work.FORWARD, 0), Computation(Work.BACKWARD, 0)
    with pytest.raises(ValueError, match="in a circle"):
        play([[backward, forward], [forward, backward]], Costs())


def test_a_message_posted_late_is_seen() -> None:
    """The execution above is a real check: a receive moved behind its consumer deadlocks."""
    programs = [list(p) for p in project(play(stage_orders("clm", 2, 2), Costs()), 2)]
    receive = next(x for x in programs[1] if x.kind is Kind.RECV_ACTIVATION)
    programs[1].remove(receive)
    programs[1].append(receive)
    with pytest.raises(AssertionError, match="deadlock"):
        execute(tuple(map(tuple, programs)), rendezvous=True)
