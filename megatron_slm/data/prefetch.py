"""Reads micro-batches ahead in threads, so that no step waits for them and read errors surface before the step."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.errors import SlmError
from megatron_slm.types import MicroBatch

_STEPS_READ = 2
"""Steps whose micro-batches are read before a step starts: its own, and the next one's, which the reference reads
ahead. The step after these is read meanwhile, so at most three steps' micro-batches are held."""


class Prefetcher:
    """The micro-batches of a run on one data-parallel rank, in the order of its steps.

    Args:
        source: reads the micro-batches.
        batch_sizes: samples of the steps over all data-parallel ranks.
        num_samples: samples of the run; nothing beyond them is read.
        num_threads: threads that read; 0 reads micro-batches on demand.
    """

    def __init__(
        self, source: MicroBatchSource, *, batch_sizes: BatchSizes, num_samples: int, num_threads: int
    ) -> None:
        self._source, self._num_samples = source, num_samples
        self._batch_sizes = batch_sizes
        self._pool = ThreadPoolExecutor(num_threads, "micro-batches") if num_threads else None
        self._ahead: dict[int, Future[MicroBatch]] = {}
        self._scheduled = 0

    def micro_batch(self, consumed_samples: int, micro_step: int) -> MicroBatch:
        """Return the same micro-batch as `MicroBatchSource.micro_batch`, read ahead if possible."""
        start = consumed_samples + micro_step * self._source.samples_together
        future = self._ahead.pop(start, None)
        return self._source.micro_batch(start, 0) if future is None else future.result()

    def prepare(self, consumed_samples: int) -> SlmError | None:
        """Read ahead for the step that starts here, and wait for the micro-batches of this and the next step.

        Returns:
            the error of a micro-batch that cannot be read; None if all are read.
        """
        if self._pool is None:
            return None
        for start in [start for start in self._ahead if start < consumed_samples]:
            del self._ahead[start]
        end, needed = (
            consumed_samples + self._batch_sizes.samples_of(steps, consumed_samples)
            for steps in (_STEPS_READ + 1, _STEPS_READ)
        )
        self._scheduled = max(self._scheduled, consumed_samples)
        while self._scheduled < min(end, self._num_samples):
            self._ahead[self._scheduled] = self._pool.submit(self._source.micro_batch, self._scheduled, 0)
            self._scheduled += self._source.samples_together
        for start, future in self._ahead.items():
            if start >= needed:
                continue
            error = future.exception()
            if isinstance(error, SlmError):
                return error
            if error is not None:
                raise error
        return None

    def close(self) -> None:
        """Stop reading."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
