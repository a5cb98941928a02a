"""Time and memory of a schedule, by simulation. Pure; no processes, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_slm.engine.schedule.costs import Work
from megatron_slm.engine.schedule.orders import model_orders
from megatron_slm.engine.schedule.programs import Event, Schedule, makespan, play
from megatron_slm.engine.schedule.search import lower_bound


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on one rank of the data whose number depends on the schedule."""

    reference_message: int
    """Hidden states of the reference between two stages."""
    micro_batch: int
    """Tokens, labels and masks of a micro-batch."""
    statistics: int
    """The reference's statistics of a micro-batch, with its last hidden states where they are distilled."""
    stage_activations: int = 0
    """Activations of a micro-batch on a stage, kept from the model's forward to its backward pass."""

    @classmethod
    def of_micro_batch(
        cls, num_samples: int, seq_length: int, *, reference_message: int, distills: bool = False
    ) -> Sizes:
        """Build the sizes that do not depend on the model.

        Args:
            distills: the reference's last hidden states and two numbers a token are kept until the model's loss.
        """
        kept = reference_message + num_samples * seq_length * 8 if distills else 0
        return cls(
            reference_message=reference_message,
            micro_batch=num_samples * (17 * seq_length + 16),  # two int64 and one bool a token; two int64 a sample
            statistics=num_samples * seq_length * 4 + kept,
        )


@dataclass(frozen=True)
class Simulation:
    """A step in the middle of a run, under the schedule's own costs."""

    schedule: Schedule

    @cached_property
    def step_ticks(self) -> int:
        """Length of the step."""
        return makespan(self.schedule.events)

    @cached_property
    def clm_ticks(self) -> int:
        """Length of the same step without a reference, on all rows of the gradient."""
        orders = model_orders(self.schedule.num_stages, self.schedule.num_micro_batches)
        return makespan(play(orders, self.schedule.costs.plain))

    @property
    def ratio(self) -> float:
        """Step time over that of CLM."""
        return self.step_ticks / self.clm_ticks

    @cached_property
    def lower_bound(self) -> float:
        """Least ratio that any schedule of the same work can have."""
        if self.schedule.leads is None:
            return self.ratio
        return lower_bound(self.schedule.costs, self.schedule.num_micro_batches) / self.clm_ticks

    def bubble_fraction(self, stage: int) -> float:
        """Compute the share of the step in which a stage is idle."""
        busy = sum(event.end - event.start for event in self.schedule.events if event.stage == stage)
        return 1.0 - busy / self.step_ticks

    def activations(self, stage: int) -> int:
        """Count the most micro-batches between their forward and backward pass on a stage."""
        forward, backward = self._events(stage, Work.FORWARD), self._events(stage, Work.BACKWARD)
        return _high_water([(e.start, 1) for e in forward] + [(e.end, -1) for e in backward])

    def unread(self, stage: int) -> int:
        """Count the most reference results that wait for a stage: sent by the one before, not yet read."""
        leads = self.schedule.leads
        if leads is None or stage == 0:
            return 0
        made, read = self._events(stage - 1, Work.REFERENCE), self._events(stage, Work.REFERENCE)
        changes = [(e.end, 1) for e in made] + [(e.start + 1, -1) for e in read]  # a read begins by taking
        return _high_water(changes, leads[stage - 1] - leads[stage])

    def micro_batches_held(self, stage: int) -> int:
        """Count the most micro-batches that a stage holds, from the first pass that reads them to the model's."""
        if stage not in (0, self.schedule.num_stages - 1):
            return 0
        forward = self._events(stage, Work.FORWARD)
        first = self._events(stage, Work.REFERENCE) if self.schedule.leads else forward
        ahead = self.schedule.leads[stage] if self.schedule.leads else 0
        return _high_water([(e.start, 1) for e in first] + [(e.end, -1) for e in forward], ahead)

    def memory_bytes(self, stage: int, sizes: Sizes) -> int:
        """Compute the bytes of these counts on one rank of a stage."""
        total = self.activations(stage) * sizes.stage_activations + self.unread(stage) * sizes.reference_message
        total += self.micro_batches_held(stage) * sizes.micro_batch
        if self.schedule.leads is not None and stage == self.schedule.num_stages - 1:
            total += self.micro_batches_held(stage) * sizes.statistics
        return total

    def _events(self, stage: int, work: Work) -> list[Event]:
        return [e for e in self.schedule.events if e.stage == stage and e.computation.work is work]


def _high_water(changes: Iterable[tuple[int, int]], level: int = 0) -> int:
    """Return the highest level under changes at given ticks; a release at a tick counts before an addition there."""
    highest = level
    for _, change in sorted(changes):
        level += change
        highest = max(highest, level)
    return highest


def describe(schedule: Schedule, costs: str, sizes: Sizes) -> str:
    """Describe a schedule in a line of the log.

    Args:
        costs: origin of the costs, in a word.
    """
    simulation, stages = Simulation(schedule), range(schedule.num_stages)
    extra = max(simulation.memory_bytes(stage, sizes) for stage in stages) / 2**20
    return (
        f"reference schedule {schedule.mode} (costs {costs}): predicted step {simulation.ratio:.3f} x CLM's, lower "
        f"bound {simulation.lower_bound:.3f}; micro-batches ahead by stage {list(schedule.leads or ())}; at most "
        f"{max(simulation.unread(stage) for stage in stages)} reference messages waiting and "
        f"{max(simulation.micro_batches_held(stage) for stage in stages)} micro-batches held, {extra:.1f} MiB a rank"
    )
