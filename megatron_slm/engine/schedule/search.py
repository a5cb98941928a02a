"""Choice of a mode's schedule for given costs: for modes that work ahead, the best of a small search. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from megatron_slm.engine.schedule.costs import Costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.orders import ListScheduler, model_orders
from megatron_slm.engine.schedule.programs import Schedule, clm, makespan, play, ride_along, sequential

Leads = tuple[int, ...]

CLOSE_ENOUGH = 1.002
"""A schedule within this factor of the lower bound ends the search."""
MAX_COMPUTATIONS = 400_000
"""Computations that one search may place: two or three seconds of work, whatever the size of the pipeline."""
_PLAIN = {Mode.CLM: clm, Mode.RIDE_ALONG: ride_along, Mode.SEQUENTIAL: sequential}
"""Modes whose schedule follows from their definition."""
_DEADLINES = (1.0, 1.01, 1.03, 1.06, 1.5)
"""Tried as factors of the lower bound: from out of the model's way to whenever a stage is idle."""


def lower_bound(costs: Costs, num_micro_batches: int) -> int:
    """Return the ticks that no schedule of a step with a reference can beat while the model keeps its 1F1B order.

    The greatest of: the model's own step; the work of each stage; and for each stage the work around its last
    backward pass, after which the stages before it still have theirs to do: `k` reference forwards run after it
    (as many as is best), the others before it.
    """
    bounds = [makespan(play(model_orders(costs.num_stages, num_micro_batches), costs))]
    before, behind = 0, 0
    for forward, backward, reference in zip(costs.forward, costs.backward, costs.reference, strict=True):
        model = num_micro_batches * (forward + backward)
        bounds.append(
            min(
                max((num_micro_batches - k) * reference, before) + model + max(behind, k * reference)
                for k in range(num_micro_batches + 1)
            )
        )
        before, behind = before + forward, behind + backward
    return max(bounds)


def choose_schedule(
    mode: Mode, costs: Costs, num_micro_batches: int, *, max_computations: int = MAX_COMPUTATIONS
) -> Schedule:
    """Choose the schedule of a mode: a pure function, so that every rank derives the same one.

    Args:
        max_computations: limit of the computations that a search places before it returns the best so far.
    """
    if mode.works_ahead:
        return _Search(mode, costs, num_micro_batches, max_computations).run()
    return _PLAIN[mode](costs, num_micro_batches)


class _Search:
    """Tries leads with the rules of `ListScheduler`: first straight lines, then neighbors of the best.

    For `bubble` there is one vector of leads: all stages are a whole step ahead.
    """

    def __init__(self, mode: Mode, costs: Costs, num_micro_batches: int, max_computations: int) -> None:
        self.mode, self.costs, self.m = mode, costs, num_micro_batches
        self.bound = lower_bound(costs, num_micro_batches)
        self.left = max_computations
        self.tried: set[Leads] = set()
        self.best_leads: Leads = (self.m,) * costs.num_stages
        self.best_ticks, self.best = self._place(self.best_leads, 2 * self.bound, eager=False)

    def run(self) -> Schedule:
        """Search; return the best schedule found."""
        self._try(self.best_leads)
        if self.mode is Mode.SKEWED:
            for leads in self._lines():
                self._try(leads)
            before = self.best_ticks + 1
            while self.best_ticks < before and not self._done():
                before = self.best_ticks
                for leads in list(self._neighbors()):
                    self._try(leads)
        return self.best

    def _done(self) -> bool:
        return self.left <= 0 or self.best_ticks <= self.bound * CLOSE_ENOUGH

    def _lines(self) -> Iterator[Leads]:
        """Leads where each stage postpones what fits into some multiple of its wait for the first micro-batch."""
        waits = list(accumulate(self.costs.forward, initial=0))[:-1]
        for quarters in (4, 8, 6, 2, 12, 5, 3, 7, 1, 10, 9, 11):
            postponed = [quarters * wait // (4 * r) for wait, r in zip(waits, self.costs.reference, strict=True)]
            yield tuple(self.m - min(self.m, most) for most in accumulate(postponed, max))

    def _neighbors(self) -> Iterator[Leads]:
        """The best leads with one more or less on a stage, or from a stage on."""
        leads, num_stages = self.best_leads, self.costs.num_stages
        spans = [(stage, num_stages) for stage in range(num_stages)]
        spans += [(stage, stage + 1) for stage in range(num_stages - 1)]
        for begin, end in spans:
            for change in (-1, 1):
                moved = (*leads[:begin], *(lead + change for lead in leads[begin:end]), *leads[end:])
                if all(0 <= lead <= self.m for lead in moved):
                    yield moved

    def _try(self, leads: Leads) -> None:
        falls = [before - after for before, after in pairwise(leads)]
        if leads in self.tried or min(falls, default=0) < 0 or max(falls, default=0) > self.costs.max_unread:
            return
        self.tried.add(leads)
        for eager in (False, True):
            for factor in _DEADLINES:
                if self._done():
                    return
                ticks, schedule = self._place(leads, int(self.bound * factor), eager=eager)
                if ticks < self.best_ticks:
                    self.best_ticks, self.best, self.best_leads = ticks, schedule, leads

    def _place(self, leads: Leads, deadline: int, *, eager: bool) -> tuple[int, Schedule]:
        self.left -= 3 * self.costs.num_stages * self.m
        scheduler = ListScheduler(self.costs, self.m, leads, deadline=deadline, eager=eager)
        orders = scheduler.run()
        return scheduler.now, Schedule(self.mode, self.costs, self.m, leads, orders)
