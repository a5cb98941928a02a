"""The interface of both engines to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_slm.engine.diagnostics import MicroBatchDiagnostics
from megatron_slm.engine.rows import RowSampler, RowSums
from megatron_slm.engine.skipping import SkipReason
from megatron_slm.engine.timers import Timers
from megatron_slm.loss.objective import ScoredTokens, StepSettings
from megatron_slm.loss.sums import LossSums
from megatron_slm.parallel.activity import Activity
from megatron_slm.types import MicroBatch, TokenStatistics


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outcome of a training step."""

    sums: LossSums
    """Sums over all micro-batches and ranks."""
    grad_norm: float
    """Global gradient norm before clipping; infinity where the step was skipped for another reason than its norm."""
    skip_reason: SkipReason | None
    """Reason to skip the step; None where it was applied."""
    seconds: float
    rows: RowSums | None = None
    """Measured by its backward passes, over all micro-batches and ranks; None where they run on all rows."""

    @property
    def skipped(self) -> bool:
        """True where nothing was updated."""
        return self.skip_reason is not None


class Trainer(Protocol):
    """One rank's part of an engine that trains. Except for `micro_batch_diagnostics`, its methods are collective."""

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, with the module and the optimizer."""
        ...

    @property
    def step_timers(self) -> Timers:
        """Timers of the training steps."""
        ...

    @property
    def rows(self) -> RowSampler | None:
        """Chooser of the rows of the backward passes; None where they run on all."""
        ...

    @property
    def exceeding_norm(self) -> float | None:
        """Gradient norm for which the last step was skipped (`StepSettings.norm_limit`); None where it was not."""
        ...

    @property
    def activity(self) -> Activity:
        """Current activity of this rank, for the watchdog."""
        ...

    def use_micro_batches(self, count: int) -> None:
        """Give the steps from the next one on so many micro-batches; the step before was run as a last one if that
        is another number."""
        ...

    def train_step(self, source: BatchSource, settings: StepSettings, *, is_last: bool) -> LossSums:
        """Run forward, backward and optimizer step; return the sums over all ranks.

        Args:
            is_last: no step follows, so that none of a next step's micro-batches is read.
        """
        ...

    def micro_batch_diagnostics(self) -> list[MicroBatchDiagnostics]:
        """Read the diagnostics of the last step's micro-batches on this rank."""
        ...

    def evaluate(self, source: BatchSource, num_micro_batches: int) -> LossSums:
        """Compute the losses of held-out micro-batches, without reference or gradient; return sums over all ranks."""
        ...

    def reference_statistics(self, source: BatchSource, num_micro_batches: int) -> list[TokenStatistics | None]:
        """Run the reference, if there is one, on micro-batches outside of training; results are on the last stage."""
        ...

    def scored_tokens(
        self, source: BatchSource, references: Sequence[TokenStatistics | None], settings: StepSettings | None
    ) -> list[ScoredTokens]:
        """Compute losses, scores and selection of micro-batches without a gradient; results are on the last stage.

        Args:
            references: the reference's statistics of each micro-batch.
            settings: None computes the losses alone.
        """
        ...


BatchSource = Callable[[int], MicroBatch]
"""Returns a micro-batch by its number, from the step's first on this data-parallel rank; the number of micro-batches of
a step, and those after it, are the next step's."""
