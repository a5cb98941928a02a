"""What every engine offers to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_slm.engine.facts import MicroBatchFacts
from megatron_slm.engine.refusal import Reason
from megatron_slm.engine.rows import RowSampler, RowSums
from megatron_slm.engine.timers import Timers
from megatron_slm.loss.objective import Probed, StepSettings
from megatron_slm.loss.sums import LossSums
from megatron_slm.parallel.activity import Activity
from megatron_slm.types import MicroBatch, TokenStatistics


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did."""

    sums: LossSums
    """Over all micro-batches and ranks."""
    grad_norm: float
    """Global gradient norm before clipping; infinity where the step was skipped."""
    refused: Reason | None
    """Why nothing was updated; None where the step was applied."""
    seconds: float
    rows: RowSums | None = None
    """Measured by its backward passes, over all micro-batches and ranks; None where they run on all rows."""

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated."""
        return self.refused is not None


class Trainer(Protocol):
    """The two engines' common face."""

    engine: Any
    timers: Timers
    rows: RowSampler | None
    """Chooses the rows of the backward passes; None where they run on all."""
    activity: Activity
    """What this rank is doing; the watchdog's source."""

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """Forward, backward and optimizer step; the sums over all ranks.

        Args:
            is_last: no step follows; nothing of a next one is read.
        """
        ...

    def micro_batch_facts(self) -> list[MicroBatchFacts]:
        """What the last step saw of each micro-batch on this rank."""
        ...

    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Losses of held-out micro-batches; the sums over all ranks."""
        ...

    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """What the reference, if there is one, says of micro-batches outside of training; on the last stage."""
        ...

    def probe(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[Probed]:
        """What is said of the tokens of micro-batches, without a gradient; on the last stage.

        Args:
            settings: None selects nothing.
        """
        ...


BatchSource = Callable[[int], MicroBatch]
"""A micro-batch by its number, counted from the step's first on this data-parallel rank; from the number of
micro-batches of a step on they are the next step's."""
