"""Lookahead: micro-batches that were read and not yet trained on, with the reference's statistics of them."""

from __future__ import annotations

from megatron_slm.types import MicroBatch, TokenStatistics


class Lookahead:
    """Holds micro-batches and statistics, addressed by micro-batch from the first of the current step.

    Number `m`, the count of micro-batches of a step, and those after it are the next step's; `advance` moves the
    origin, and what was read ahead is found under its new number.

    Args:
        trains: they are of training steps.
    """

    def __init__(self, *, trains: bool = True) -> None:
        self.trains = trains
        self._origin = 0
        self._batches: dict[int, MicroBatch] = {}
        self._statistics: dict[int, TokenStatistics] = {}

    def __contains__(self, i: int) -> bool:
        return self._origin + i in self._batches

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, i: int, batch: MicroBatch) -> None:
        """Hold a micro-batch."""
        self._batches[self._origin + i] = batch

    def batch(self, i: int) -> MicroBatch:
        """Return a micro-batch that is held."""
        return self._batches[self._origin + i]

    def remove(self, i: int) -> None:
        """Release a micro-batch, if it is held."""
        self._batches.pop(self._origin + i, None)

    def add_reference(self, i: int, statistics: TokenStatistics) -> None:
        """Hold the reference's statistics of a micro-batch."""
        self._statistics[self._origin + i] = statistics

    def take_reference(self, i: int) -> TokenStatistics | None:
        """Remove and return the reference's statistics of a micro-batch; None where there are none."""
        return self._statistics.pop(self._origin + i, None)

    def advance(self, num_micro_batches: int) -> None:
        """End a step: count from the next one's first micro-batch."""
        self._origin += num_micro_batches
        behind = [i for i in (*self._batches, *self._statistics) if i < self._origin]
        assert not behind, f"micro-batches {behind} were read and not trained on"
