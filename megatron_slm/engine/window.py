"""Micro-batches that were read and are not yet trained on, with what the reference says of them."""

from __future__ import annotations

from megatron_slm.types import MicroBatch, TokenStatistics


class Window:
    """Keeps them by their number from the first step of this process on.

    Its users count from the first micro-batch of the step at hand, so number `m` and on are the next step's;
    `advance` moves that origin, and what was read ahead is found under its new number.
    """

    def __init__(self) -> None:
        self._origin = 0
        self._batches: dict[int, MicroBatch] = {}
        self._statistics: dict[int, TokenStatistics] = {}

    def __contains__(self, i: int) -> bool:
        return self._origin + i in self._batches

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, i: int, batch: MicroBatch) -> None:
        """Keep a micro-batch."""
        self._batches[self._origin + i] = batch

    def batch(self, i: int) -> MicroBatch:
        """A micro-batch that was added."""
        return self._batches[self._origin + i]

    def remove(self, i: int) -> None:
        """Let go of a micro-batch, where it is held at all."""
        self._batches.pop(self._origin + i, None)

    def add_reference(self, i: int, statistics: TokenStatistics) -> None:
        """Keep what the reference says of a micro-batch."""
        self._statistics[self._origin + i] = statistics

    def take_reference(self, i: int) -> TokenStatistics | None:
        """What the reference says of a micro-batch, once; None where it was not asked."""
        return self._statistics.pop(self._origin + i, None)

    def advance(self, num_micro_batches: int) -> None:
        """A step is done: count from the next one's first micro-batch."""
        self._origin += num_micro_batches
        behind = [i for i in (*self._batches, *self._statistics) if i < self._origin]
        assert not behind, f"micro-batches {behind} were read and not trained on"
