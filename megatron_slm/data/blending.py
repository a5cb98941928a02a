"""Training samples: a weighted blend of corpora.

Weights may change at given samples (phases); each corpus keeps its read position.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_slm.arithmetic import ceil_div
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar_of
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.interleave import Interleave
from megatron_slm.data.reading import Piece, Rewrite, Sample
from megatron_slm.data.samples import OrderedSamples

_SURPLUS = 0.005
"""Megatron lays out this much more of each corpus of a blend than its share (`mid_level_dataset_surplus`)."""

_SEED_STEP = 1_000_003


MakeSamples = Callable[[int | None, int], OrderedSamples]
"""Makes samples of one corpus, from their least number (None: one epoch) and an offset to the run's seed."""


class Source:
    """The samples of one corpus of a run, one order after another.

    An order is laid out for a number of samples, because Megatron's order depends on it. An extended run keeps its
    orders and appends a new one, so that no sample repeats before the earlier orders end.

    Args:
        name: name of the corpus in metrics and checkpoints.
        make: makes the samples of one order.
        laid_out: number of samples each order was laid out for, in order.
        sequences: sequences of the corpus to read, [start, stop).
    """

    def __init__(self, name: str, make: MakeSamples, laid_out: Sequence[int], sequences: tuple[int, int]) -> None:
        self.name, self.laid_out, self.sequences = name, list(laid_out), sequences
        self.orders = [make(count, i * _SEED_STEP) for i, count in enumerate(self.laid_out)]
        # read now, not at a save: the file may be rewritten while the run reads the old one
        sidecar = read_sidecar_of(self.orders[0].corpus)
        self.content = None if sidecar is None else sidecar.bin_sha256
        """SHA-256 of the corpus's tokens from its sidecar; None if unknown."""
        self._ends = [sum(map(len, self.orders[: i + 1])) for i in range(len(self.orders))]

    @classmethod
    def for_samples(
        cls, name: str, make: MakeSamples, needed: int, laid_out: Sequence[int], sequences: tuple[int, int]
    ) -> Source:
        """Make a source of at least `needed` samples that keeps the orders laid out before."""
        source = cls(name, make, laid_out or [needed], sequences)
        while (missing := needed - len(source)) > 0:
            left_out = sum(order.num_left_out for order in source.orders)
            to_lay_out = ceil_div(missing * (len(source) + left_out), len(source))
            source = cls(name, make, [*source.laid_out, to_lay_out], sequences)
        return source

    @property
    def corpus(self) -> IndexedCorpus:
        """The corpus that every order reads."""
        return self.orders[0].corpus

    @property
    def corpora(self) -> list[IndexedCorpus]:
        """The corpus and its loss mask, if any."""
        mask = self.orders[0].loss_mask
        return [self.corpus] if mask is None else [self.corpus, mask]

    @property
    def order_fingerprint(self) -> str:
        """Hash of its samples and their order."""
        fingerprints = [order.order_fingerprint for order in self.orders]
        return fingerprints[0] if len(fingerprints) == 1 else _digest(fingerprints)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Sample:
        """Read sample `index` of the corpus.

        Raises:
            IndexError: the sample does not exist.
            CorpusError: it cannot be read.
        """
        order, number = self._locate(index)
        return order[number]

    def pieces(self, index: int) -> list[Piece]:
        """Return the pieces of sample `index` of the corpus.

        Raises:
            IndexError: the sample does not exist.
        """
        order, number = self._locate(index)
        return order.pieces(number)

    def _locate(self, index: int) -> tuple[OrderedSamples, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        order = bisect_right(self._ends, index)
        return self.orders[order], index - (self._ends[order - 1] if order else 0)

    def epochs(self, num_samples: int) -> float:
        """Return the number of epochs of the corpus in its first `num_samples` samples."""
        first = self.orders[0]
        return num_samples * first.num_epochs / len(first)


@dataclass(frozen=True)
class Phase:
    """A range of samples of the run with one blend of corpora."""

    first_sample: int
    weights: dict[int, float]
    """Weights by number of the source, adding up to 1."""


def needed_samples(weight: float, num_samples: int) -> int:
    """Return the number of samples that Megatron lays out of a corpus with this weight in a blend.

    No draw exceeds it: the greedy rule is never more than one sample ahead of a weight.
    """
    return math.ceil(math.ceil(num_samples * weight) * (1 + _SURPLUS))


class BlendedSamples:
    """The training samples of a run.

    Args:
        sources: the corpora of the run.
        phases: phases by rising first sample, the first from sample 0.
        num_samples: number of samples that the run draws.
        cache: cache of the indices; None keeps them in memory.
        rewrite: makes of each sample, by its number in the run, the one that is trained on; None: it stays as it is.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        num_samples: int,
        cache: IndexCache | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        self._rewrite = rewrite
        self.sources, self.phases, self._num_samples = tuple(sources), tuple(phases), num_samples
        self.sequence_length = self.sources[0].orders[0].sequence_length
        self._firsts = [phase.first_sample for phase in phases]
        ends = [*self._firsts[1:], num_samples]
        self._interleaves = [
            Interleave(tuple(phase.weights.values()), max(0, end - phase.first_sample), cache)
            for phase, end in zip(phases, ends, strict=True)
        ]

    @property
    def name(self) -> str:
        """Prefixes of the corpora, for messages."""
        return " + ".join(source.corpus.prefix for source in self.sources)

    @property
    def order_fingerprint(self) -> str:
        """SHA-256 of the samples and their order: equal if and only if both are equal."""
        if len(self.sources) == 1:
            return self.sources[0].order_fingerprint
        return _digest([self._described_phases(None), [source.order_fingerprint for source in self.sources]])

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int, /) -> Sample:
        """Read sample `index` of the run.

        Raises:
            IndexError: the run draws no such sample.
            CorpusError: it cannot be read.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self.name}, of which the run draws {self._num_samples}")
        source, number = self.locate(index)
        sample = self.sources[source][number]._replace(source=source)
        return sample if self._rewrite is None else self._rewrite(sample, index)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the source of a sample, and the sample's number in that source."""
        if len(self.sources) == 1:
            return 0, index
        at = bisect_right(self._firsts, index) - 1
        phase = self.phases[at]
        place, number = self._interleaves[at][index - phase.first_sample]
        source = list(phase.weights)[place]
        return source, self._consumed_before[at][source] + number

    @cached_property
    def _consumed_before(self) -> list[list[int]]:
        return [self.consumed(phase.first_sample) for phase in self.phases]

    def consumed(self, num_samples: int) -> list[int]:
        """Count the run's first `num_samples` samples by source."""
        total = [0] * len(self.sources)
        for phase, interleave in zip(self.phases, self._interleaves, strict=True):
            inside = min(max(0, num_samples - phase.first_sample), interleave.size)
            if inside:
                for source, count in zip(phase.weights, interleave.drawn(inside), strict=True):
                    total[source] += count
        return total

    def state(self, num_samples: int) -> dict[str, Any]:
        """Return the state that a checkpoint saves after `num_samples` samples: a few values per source."""
        consumed = self.consumed(num_samples)
        return {
            "consumed": {s.name: count for s, count in zip(self.sources, consumed, strict=True)},
            "laid_out": {s.name: s.laid_out for s in self.sources},
            "content": {s.name: s.content for s in self.sources},
            "order": {s.name: s.orders[0].order_fingerprint for s in self.sources},
            "phases": self._described_phases(num_samples),
        }

    def difference(self, state: dict[str, Any], num_samples: int) -> tuple[str, Any, Any] | None:
        """Compare the first `num_samples` samples with those that led to `state`.

        Returns:
            the first difference, its value in `state`, its value here; None if these samples continue from `state`.
        """
        saved_phases, phases = state["phases"], self._described_phases(num_samples)
        if saved_phases != phases:
            return f"blend of the first {num_samples} samples", saved_phases, phases
        current = self.state(num_samples)
        for name, count in state["consumed"].items():
            if count == 0:
                continue
            for key in ("order", "consumed"):
                if state[key].get(name) != current[key].get(name):
                    return f"{key} of the corpus {name}", state[key].get(name), current[key].get(name)
            saved_content, content = state.get("content", {}).get(name), current["content"].get(name)
            if saved_content and content and saved_content != content:
                return f"content of the corpus {name}", saved_content[:12], content[:12]
        return None

    def _described_phases(self, before: int | None) -> list[list[Any]]:
        """Return first sample and weights of the phases that begin before a sample; None: of all."""
        if len(self.sources) == 1:
            return [[0, {self.sources[0].name: 1.0}]]
        return [
            [phase.first_sample, {self.sources[source].name: weight for source, weight in phase.weights.items()}]
            for phase in self.phases
            if before is None or phase.first_sample < max(before, 1)
        ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
