"""Orders of each stage's computations: where the modes differ. Pure; no processes, no tensors.

Micro-batches are counted from the step's first. The reference may be ahead of the model: at the end of a step
stage `s` has run its first `leads[s]` forwards of the next step's micro-batches already, so that in every step
it runs numbers `leads[s]` to `leads[s] + m - 1`, where numbers from `m` are the next step's.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from megatron_slm.engine.schedule.costs import Costs, Work


class Computation(NamedTuple):
    """One computation of one micro-batch on one stage."""

    work: Work
    micro_batch: int


Orders = list[list[Computation]]
"""Every stage's computations, in order."""


def one_forward_one_backward(num_stages: int, num_micro_batches: int, stage: int) -> list[Computation]:
    """Return the model's order on one stage: a warm-up of forwards, then one of each, then the last backwards."""
    warm_up = min(num_stages - 1 - stage, num_micro_batches)
    order = [Computation(Work.FORWARD, i) for i in range(warm_up)]
    for i in range(num_micro_batches - warm_up):
        order += [Computation(Work.FORWARD, warm_up + i), Computation(Work.BACKWARD, i)]
    return order + [Computation(Work.BACKWARD, i) for i in range(num_micro_batches - warm_up, num_micro_batches)]


def model_orders(num_stages: int, num_micro_batches: int) -> Orders:
    """Order the model alone."""
    return [one_forward_one_backward(num_stages, num_micro_batches, stage) for stage in range(num_stages)]


def ride_along_orders(num_stages: int, num_micro_batches: int) -> Orders:
    """Order the reference's forward of a micro-batch right before the model's; the plainest of all."""
    orders: Orders = []
    for model in model_orders(num_stages, num_micro_batches):
        orders.append([])
        for computation in model:
            if computation.work is Work.FORWARD:
                orders[-1].append(Computation(Work.REFERENCE, computation.micro_batch))
            orders[-1].append(computation)
    return orders


def reference_orders(begins: Sequence[int], ends: Sequence[int]) -> Orders:
    """Order the reference alone, on stage `s` micro-batches `begins[s]` to `ends[s] - 1`."""
    return [[Computation(Work.REFERENCE, i) for i in range(*span)] for span in zip(begins, ends, strict=True)]


def sequential_orders(num_stages: int, num_micro_batches: int) -> Orders:
    """Order all of the reference, then the model."""
    first = reference_orders([0] * num_stages, [num_micro_batches] * num_stages)
    return [[*a, *b] for a, b in zip(first, model_orders(num_stages, num_micro_batches), strict=True)]


def without_next_step(orders: Orders, num_micro_batches: int) -> Orders:
    """Leave out the reference work for the next step: the orders of a step that none follows."""
    return [[computation for computation in order if computation.micro_batch < num_micro_batches] for order in orders]


class ListScheduler:
    """Merges the reference's forwards into the model's 1F1B order by simulating both with the costs.

    A stage runs the reference where the next computation of the model is not ready, unless that would push
    the latter past its latest start: the one by which a step can still end at `deadline`. So an early deadline
    keeps the reference out of the model's way, and a distant one lets it take all idle time.

    Args:
        leads: reference forwards of the next step that each stage does (see above); they never rise from one stage to
            the next, nor fall by more than `costs.max_unread`.
        deadline: ticks from the start of the step.
        eager: the reference comes before a computation of the model that is ready, too.
    """

    def __init__(
        self,
        costs: Costs,
        num_micro_batches: int,
        leads: Sequence[int],
        *,
        deadline: int,
        eager: bool,
    ) -> None:
        self.costs, self.m, self.leads, self.eager = costs, num_micro_batches, leads, eager
        self.max_unread = costs.max_unread
        self.num_stages = costs.num_stages
        self.model = model_orders(self.num_stages, num_micro_batches)
        tails = longest_tails(self.model, costs)
        self.latest = [[deadline - tail for tail in stage] for stage in tails]
        self.orders: Orders = [[] for _ in range(self.num_stages)]
        # counts suffice, since each stage runs each kind of computation in the order of micro-batches
        self.next_model = [0] * self.num_stages
        self.forwards_done = [0] * self.num_stages
        self.backwards_done = [0] * self.num_stages
        self.references_begun = list(leads)
        self.references_done = list(leads)
        self.running: list[Work | None] = [None] * self.num_stages
        self._heap: list[tuple[int, int]] = []
        self.now = 0
        """Ticks; after `run`, the step's length."""

    def run(self) -> Orders:
        """Simulate a step; return the orders of all stages."""
        stages = set(range(self.num_stages))
        left = self.num_stages * 3 * self.m
        while left:
            for stage in sorted(stages):
                self._start(stage, self.now)
            if not self._heap:
                self._start_any_reference(self.now)
            stages = set()
            self.now = self._heap[0][0]
            while self._heap and self._heap[0][0] == self.now:
                _, stage = heapq.heappop(self._heap)
                self._finish(stage)
                stages.update((stage - 1, stage, stage + 1))
                left -= 1
            stages &= set(range(self.num_stages))
        return self.orders

    def _start(self, stage: int, now: int) -> None:
        if self.running[stage] is not None:
            return
        at, order = self.next_model[stage], self.model[stage]
        model = at < len(order) and self._model_ready(stage, order[at])
        if (self.eager or not model) and self._reference_ready(stage) and self._fits(stage, at, now):
            self._begin_reference(stage, now)
        elif model:
            self.next_model[stage] += 1
            self._begin(stage, now, order[at])

    def _fits(self, stage: int, at: int, now: int) -> bool:
        if at == len(self.model[stage]) or self._waits_for_reference(stage, at):
            return True
        return now + self.costs.reference[stage] <= self.latest[stage][at]

    def _waits_for_reference(self, stage: int, at: int) -> bool:
        if stage < self.num_stages - 1:
            return False
        work, i = self.model[stage][at]
        return work is Work.FORWARD and self.references_done[stage] <= i

    def _model_ready(self, stage: int, computation: Computation) -> bool:
        work, i = computation
        if work is Work.BACKWARD:
            return stage == self.num_stages - 1 or self.backwards_done[stage + 1] > i
        if stage == self.num_stages - 1 and self.references_done[stage] <= i:
            return False
        return stage == 0 or self.forwards_done[stage - 1] > i

    def _reference_ready(self, stage: int) -> bool:
        begun = self.references_begun[stage]
        if begun == self.leads[stage] + self.m:
            return False
        if stage < self.num_stages - 1 and begun - self.references_begun[stage + 1] >= self.max_unread:
            return False
        return stage == 0 or self.references_done[stage - 1] > begun

    def _begin_reference(self, stage: int, now: int) -> None:
        computation = Computation(Work.REFERENCE, self.references_begun[stage])
        self.references_begun[stage] += 1
        self._begin(stage, now, computation)
        if stage and self.running[stage - 1] is None:
            self._start(stage - 1, now)  # it may have waited for this one to be read

    def _begin(self, stage: int, now: int, computation: Computation) -> None:
        self.running[stage] = computation.work
        self.orders[stage].append(computation)
        heapq.heappush(self._heap, (now + self.costs.of(computation.work)[stage], stage))

    def _finish(self, stage: int) -> None:
        done = {
            Work.FORWARD: self.forwards_done,
            Work.BACKWARD: self.backwards_done,
            Work.REFERENCE: self.references_done,
        }
        work = self.running[stage]
        assert work is not None, "only what runs can finish"
        done[work][stage] += 1
        self.running[stage] = None

    def _start_any_reference(self, now: int) -> None:
        """Start the latest stage's reference: nothing runs, nothing fits, and the model waits for one held back."""
        stage = max(s for s in range(self.num_stages) if self._reference_ready(s))
        self._begin_reference(stage, now)


def longest_tails(orders: Orders, costs: Costs) -> list[list[int]]:
    """Return the least ticks from the start of each of the model's computations to the end of the step."""
    num_stages = len(orders)
    tails = [[0] * len(order) for order in orders]
    at = [len(order) - 1 for order in orders]
    by_item: dict[tuple[Work, int, int], int] = {}
    moved = True
    while moved:
        moved = False
        for stage in range(num_stages):
            while at[stage] >= 0:
                work, i = orders[stage][at[stage]]
                following = stage + 1 if work is Work.FORWARD else stage - 1
                after = tails[stage][at[stage] + 1] if at[stage] + 1 < len(orders[stage]) else 0
                if 0 <= following < num_stages:
                    key = (work, i, following)
                    if key not in by_item:
                        break
                    after = max(after, by_item[key])
                tails[stage][at[stage]] = by_item[work, i, stage] = after + costs.of(work)[stage]
                at[stage] -= 1
                moved = True
    return tails
