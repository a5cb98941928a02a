"""Schedules without processes: whole runs executed as data, under every meaning a send can have."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.orders import Computation, ListScheduler, model_orders
from megatron_slm.engine.schedule.programs import (
    Instruction,
    Kind,
    Schedule,
    clm,
    forward_programs,
    makespan,
    play,
    project,
    ride_along,
    sequential,
)
from megatron_slm.engine.schedule.search import choose_schedule, lower_bound
from megatron_slm.parallel.channels import Channel
from tests.engine.schedule.execution import CONSUMES, execute, run_of

SEMANTICS = (0, Channel.MAX_SENDS_IN_FLIGHT, None)


@st.composite
def costs_of(draw: Any, num_stages: int) -> Costs:
    """Any costs: a few values, so that ends coincide often, or many."""
    most = draw(st.sampled_from([2, 6, 3000]))
    ticks = st.lists(st.integers(1, most), min_size=num_stages, max_size=num_stages).map(tuple)
    return Costs(forward=draw(ticks), backward=draw(ticks), reference=draw(ticks))


@st.composite
def listed_schedules(draw: Any, most_stages: int = 6, most_micro_batches: int = 9) -> Schedule:
    """A schedule by list scheduling with any leads that are allowed, good or bad."""
    num_stages, m = draw(st.integers(1, most_stages)), draw(st.integers(1, most_micro_batches))
    costs = draw(costs_of(num_stages))
    leads = [draw(st.integers(0, m))]
    for _ in range(num_stages - 1):
        leads.append(draw(st.integers(max(0, leads[-1] - costs.max_unread), leads[-1])))
    deadline = int(lower_bound(costs, m) * draw(st.sampled_from([0.5, 1.0, 1.1, 3.0])))
    orders = ListScheduler(costs, m, leads, deadline=deadline, eager=draw(st.booleans())).run()
    return Schedule(Mode.SKEWED, costs, m, tuple(leads), orders)


def check(schedule: Schedule, num_steps: int) -> None:
    for max_unmatched in SEMANTICS:
        trace = execute(run_of(schedule, num_steps), max_unmatched=max_unmatched)
        every = Counter({i: 1 for i in range(num_steps * schedule.num_micro_batches)})
        for stage in range(schedule.num_stages):
            done = {kind: Counter(x.micro_batch for s, x in trace if s == stage and x.kind is kind) for kind in Kind}
            assert done[Kind.FORWARD] == done[Kind.BACKWARD] == every
            assert done[Kind.REFERENCE_FORWARD] == (Counter() if schedule.leads is None else every)


@settings(max_examples=1500, deadline=None)
@given(listed_schedules(), st.integers(1, 3))
def test_a_run_by_list_scheduling_finishes(schedule: Schedule, num_steps: int) -> None:
    check(schedule, num_steps)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(listed_schedules(16, 24), st.integers(1, 3))
def test_a_large_run_by_list_scheduling_finishes(schedule: Schedule, num_steps: int) -> None:
    check(schedule, num_steps)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([clm, ride_along, sequential]), st.integers(1, 8), st.integers(1, 12))
def test_a_run_of_the_plain_modes_finishes(data: Any, make: Any, num_stages: int, num_micro_batches: int) -> None:
    check(make(data.draw(costs_of(num_stages)), num_micro_batches), num_steps=2)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([Mode.SKEWED, Mode.BUBBLE]), st.integers(1, 6), st.integers(1, 12))
def test_a_run_by_the_search_finishes(data: Any, mode: Any, num_stages: int, num_micro_batches: int) -> None:
    check(choose_schedule(mode, data.draw(costs_of(num_stages)), num_micro_batches), num_steps=3)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(SEMANTICS))
def test_evaluation_finishes(num_stages: int, num_micro_batches: int, max_unmatched: int | None) -> None:
    trace = execute(forward_programs(Work.FORWARD, num_stages, num_micro_batches), max_unmatched=max_unmatched)
    assert Counter(x.kind for _, x in trace)[Kind.FORWARD] == num_stages * num_micro_batches
    assert {x.kind for _, x in trace} <= {
        Kind.LOAD_MICRO_BATCH,
        Kind.FORWARD,
        Kind.SEND_ACTIVATION,
        Kind.RECV_ACTIVATION,
    }


@settings(max_examples=300, deadline=None)
@given(listed_schedules())
def test_few_reference_results_wait_for_the_next_stage(schedule: Schedule) -> None:
    """By each stage's own program: receives posted beyond reads, which is the memory that they take."""
    for stage, program in enumerate(run_of(schedule, 3)):
        waiting = 0
        for kind, _ in program:
            waiting += kind is Kind.RECV_REFERENCE_ACTIVATION
            waiting -= kind is Kind.REFERENCE_FORWARD and stage > 0
            assert waiting <= schedule.costs.max_unread


def test_skewed_leads_follow_from_the_orders() -> None:
    schedule = choose_schedule(Mode.SKEWED, Costs.uniform(4), 8)
    assert schedule.leads == (8, 7, 6, 5)
    for stage, (order, lead) in enumerate(zip(schedule.orders, schedule.leads, strict=True)):
        references = [item.micro_batch for item in order if item.work is Work.REFERENCE]
        assert references == list(range(lead, lead + 8)), stage
    assert [len([x for x in p if x.kind is Kind.REFERENCE_FORWARD]) for p in schedule.prologue] == [8, 7, 6, 5]
    last = [[x.micro_batch for x in p if x.kind is Kind.REFERENCE_FORWARD] for p in schedule.last]
    assert last == [[], [7], [6, 7], [5, 6, 7]]


def test_ride_along_runs_the_reference_right_before_the_model() -> None:
    for program in ride_along(Costs.uniform(3), 5).step:
        work = [x for x in program if x.kind in CONSUMES]
        for before, after in pairwise(work):
            if after.kind is Kind.FORWARD:
                assert before == Instruction(Kind.REFERENCE_FORWARD, after.micro_batch)


def test_a_micro_batch_is_loaded_before_it_is_used_on_the_first_and_last_stage() -> None:
    for stage, program in enumerate(run_of(choose_schedule(Mode.SKEWED, Costs.uniform(4), 6), 2)):
        loads = [x for x in program if x.kind in (Kind.LOAD_MICRO_BATCH, Kind.LOAD_REFERENCE_MICRO_BATCH)]
        assert len(loads) == (24 if stage in (0, 3) else 0)
        for kind, i in loads:
            user = Kind.FORWARD if kind is Kind.LOAD_MICRO_BATCH else Kind.REFERENCE_FORWARD
            assert program.index(Instruction(kind, i)) < program.index(Instruction(user, i))


def test_a_step_ends_with_reductions_and_the_optimizer_once() -> None:
    end = [Kind.REDUCE_TIED_GRADIENTS, Kind.REDUCE_GRADIENTS, Kind.OPTIMIZER_STEP]
    schedule = choose_schedule(Mode.SKEWED, Costs.uniform(2), 3)
    for program in (*schedule.step, *schedule.last):
        assert [x.kind for x in program if x.kind in end] == end
        assert [x.kind for x in program[-3:]] == end
    assert not any(x.kind in end for program in schedule.prologue for x in program)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 4), (4, 8), (4, 2), (8, 16)])
def test_makespan_is_that_of_one_forward_one_backward(num_stages: int, num_micro_batches: int) -> None:
    events = clm(Costs.uniform(num_stages, forward=1, backward=2), num_micro_batches).events
    assert makespan(events) == 30_000 * (num_micro_batches + num_stages - 1)


def test_the_model_order_is_deepspeeds() -> None:
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    for mode in (Mode.CLM, Mode.SKEWED):
        for stage, program in enumerate(choose_schedule(mode, Costs.uniform(4), 9).step):
            stock = [
                c for step in TrainSchedule(9, 4, stage) for c in step if isinstance(c, ForwardPass | BackwardPass)
            ]
            ours = [x.kind for x in program if x.kind in (Kind.FORWARD, Kind.BACKWARD)]
            assert ours == [Kind.FORWARD if isinstance(c, ForwardPass) else Kind.BACKWARD for c in stock]


def test_orders_that_wait_for_each_other_are_refused() -> None:
    forward, backward = Computation(Work.FORWARD, 0), Computation(Work.BACKWARD, 0)
    with pytest.raises(ValueError, match="in a circle"):
        play([[backward, forward], [forward, backward]], Costs.uniform(2))


def test_a_loss_before_the_references_is_refused() -> None:
    order = [Computation(Work.FORWARD, 0), Computation(Work.REFERENCE, 0), Computation(Work.BACKWARD, 0)]
    with pytest.raises(ValueError, match="in a circle"):
        play([order], Costs.uniform(1), [0])


def test_a_message_posted_late_is_seen() -> None:
    """The execution above is a real check: a receive moved behind its consumer deadlocks."""
    programs = [list(p) for p in project(play(model_orders(2, 2), Costs.uniform(2)), 2)]
    receive = next(x for x in programs[1] if x.kind is Kind.RECV_ACTIVATION)
    programs[1].remove(receive)
    programs[1].append(receive)
    for max_unmatched in SEMANTICS:
        with pytest.raises(AssertionError, match=r"deadlock|another micro-batch"):
            execute(programs, max_unmatched=max_unmatched)
