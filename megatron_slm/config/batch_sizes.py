"""Global batch sizes of a run: one, or a schedule of several by the samples drawn so far."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from megatron_slm.arithmetic import ceil_div
from megatron_slm.errors import ConfigError

SCHEDULE = "--step-batch-size-schedule"
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)")


@dataclass(frozen=True)
class BatchSizes:
    """Samples of each step over all ranks, a function of the samples drawn before it."""

    sizes: tuple[int, ...]
    first_samples: tuple[int, ...] = (0,)
    """Sizes apply to steps that start at these samples or later, ascending from 0."""

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """Build the sizes of a run whose batches are alike."""
        return cls((size,))

    @classmethod
    def parse(cls, text: str, *, sequence_length: int) -> BatchSizes:
        """Parse Megatron's `0:768 250B:1536`: thresholds in tokens, with suffixes K, M, B, T, and batch sizes.

        Raises:
            ConfigError: it is something else.
        """
        first_samples, sizes = [], []
        for entry in text.split():
            found = _ENTRY.fullmatch(entry)
            rule = "list TOKENS:SAMPLES from 0 on, rising, like 0:768 250B:1536 (suffixes K, M, B, T)"
            if found is None or int(found[3]) == 0:
                raise ConfigError(SCHEDULE, text, f"{rule}, unlike {entry}", "correct it")
            first_samples.append(int(float(found[1]) * _SUFFIXES[found[2]]) // sequence_length)
            sizes.append(int(found[3]))
        if not sizes or first_samples[0] != 0 or any(a >= b for a, b in pairwise(first_samples)):
            rule = f"list TOKENS:SAMPLES from 0 on, rising by --seq-length ({sequence_length}) or more"
            raise ConfigError(SCHEDULE, text, rule, "start with 0:SAMPLES, then raise the tokens")
        return cls(tuple(sizes), tuple(first_samples))

    @property
    def largest(self) -> int:
        """Size of the largest batch."""
        return max(self.sizes)

    def at(self, consumed_samples: int) -> int:
        """Return the size of the step that starts after these samples of the run."""
        return next(size for size, first in self._backwards() if first <= consumed_samples)

    def samples_of(self, num_steps: int, consumed_samples: int = 0) -> int:
        """Count the samples of so many steps, the first of which starts after `consumed_samples`."""
        end = consumed_samples
        while num_steps > 0:
            size, change = self.at(end), self._next_change(end)
            steps = num_steps if change is None else min(num_steps, ceil_div(change - end, size))
            end, num_steps = end + steps * size, num_steps - steps
        return end - consumed_samples

    def step_of(self, sample: int) -> tuple[int, int]:
        """Return the number of the step, from 0, that draws a sample, and the sample's place in it."""
        begin = step = 0
        while True:
            size, change = self.at(begin), self._next_change(begin)
            steps = (sample - begin) // size
            if change is None or begin + steps * size < change:
                return step + steps, sample - begin - steps * size
            skipped = ceil_div(change - begin, size)
            begin, step = begin + skipped * size, step + skipped

    def describe(self, sequence_length: int) -> str:
        """Name the sizes, with the tokens from which they apply."""
        if len(self.sizes) == 1:
            return str(self.sizes[0])
        named = zip(self.sizes, self.first_samples, strict=True)
        return ", ".join(f"{size} from {first * sequence_length:,} tokens on" for size, first in named)

    def _backwards(self) -> list[tuple[int, int]]:
        return list(zip(self.sizes, self.first_samples, strict=True))[::-1]

    def _next_change(self, consumed_samples: int) -> int | None:
        return next((first for first in self.first_samples if first > consumed_samples), None)
