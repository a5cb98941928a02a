"""A run's training samples: one corpus or a blend of several, in phases that leave each its place."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar_of
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.interleave import Interleave
from megatron_slm.data.packing import Samples
from megatron_slm.data.reading import Piece, Sample

_SURPLUS = 0.005
"""Megatron draws up this much more of each corpus of a blend than its share (`mid_level_dataset_surplus`)."""

_SEED_STEP = 1_000_003


class OrderedSamples(Samples, Protocol):
    """Samples of one corpus in an order that has a fingerprint."""

    corpus: IndexedCorpus
    num_epochs: int
    tokens_per_epoch: int
    loss_mask: IndexedCorpus | None

    @property
    def order_fingerprint(self) -> str:
        """Stands for the samples and their order."""

    def pieces(self, index: int) -> list[Piece]:
        """What a sample is made of; padding follows them where they do not fill it."""


MakeSamples = Callable[[int | None, int], OrderedSamples]
"""Samples of one corpus: how many are asked for at least (None: one epoch), and an offset to the run's seed."""


class Source:
    """One corpus of a run: what it gives, one laid-out order after the other.

    An order is laid out for a number of samples, because Megatron's depends on it. A run that is extended keeps the
    orders it has begun with and goes on behind them with a new one, so that nothing repeats before its time.

    Args:
        name: what it is called in metrics and checkpoints.
        make: its samples.
        laid_out: for how many samples each order was laid out, from the first one on.
        sequences: which of the corpus's sequences are read, [start, stop).
    """

    def __init__(self, name: str, make: MakeSamples, laid_out: Sequence[int], sequences: tuple[int, int]) -> None:
        self.name, self.laid_out, self.sequences = name, list(laid_out), sequences
        self.orders = [make(count, i * _SEED_STEP) for i, count in enumerate(self.laid_out)]
        # now, and not at a save: the file may be rewritten while the run reads the old one
        sidecar = read_sidecar_of(self.orders[0].corpus)
        self.content = None if sidecar is None else sidecar.bin_sha256
        """SHA-256 of the corpus's tokens as its sidecar says; None where it says nothing."""
        self._ends = [sum(map(len, self.orders[: i + 1])) for i in range(len(self.orders))]

    @classmethod
    def for_samples(
        cls, name: str, make: MakeSamples, needed: int, laid_out: Sequence[int], sequences: tuple[int, int]
    ) -> Source:
        """A source of at least `needed` samples that keeps the orders that were laid out before."""
        source = cls(name, make, laid_out or [needed], sequences)
        missing = needed - len(source)
        return source if missing <= 0 else cls(name, make, [*source.laid_out, missing], sequences)

    @property
    def corpus(self) -> IndexedCorpus:
        """Where its tokens are."""
        return self.orders[0].corpus

    @property
    def corpora(self) -> list[IndexedCorpus]:
        """The corpus, and its loss mask where it has one."""
        mask = self.orders[0].loss_mask
        return [self.corpus] if mask is None else [self.corpus, mask]

    @property
    def order_fingerprint(self) -> str:
        """Stands for its samples and their order."""
        fingerprints = [order.order_fingerprint for order in self.orders]
        return fingerprints[0] if len(fingerprints) == 1 else _digest(fingerprints)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Sample:
        """Its sample `index`.

        Raises:
            IndexError: there is no such sample.
            CorpusError: it cannot be read.
        """
        order, number = self._locate(index)
        return order[number]

    def pieces(self, index: int) -> list[Piece]:
        """What its sample `index` is made of.

        Raises:
            IndexError: there is no such sample.
        """
        order, number = self._locate(index)
        return order.pieces(number)

    def _locate(self, index: int) -> tuple[OrderedSamples, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        order = bisect_right(self._ends, index)
        return self.orders[order], index - (self._ends[order - 1] if order else 0)

    def epochs(self, num_samples: int) -> float:
        """How many times its first `num_samples` samples go through the corpus."""
        first = self.orders[0]
        return num_samples * first.num_epochs / len(first)


@dataclass(frozen=True)
class Phase:
    """Weights that hold from a sample of the run on."""

    first_sample: int
    weights: dict[int, float]
    """By number of the source; they add up to 1."""


def needed_samples(weight: float, num_samples: int) -> int:
    """Samples that Megatron lays out of a corpus which gets this share of a blend.

    No draw goes beyond it: the greedy rule is never more than one sample ahead of a weight.
    """
    return math.ceil(math.ceil(num_samples * weight) * (1 + _SURPLUS))


class BlendedSamples:
    """The samples of a run, by their number.

    Args:
        sources: its corpora.
        phases: from sample 0 on, rising.
        num_samples: how many the run draws.
        cache: where indices are kept.
    """

    def __init__(
        self, sources: Sequence[Source], phases: Sequence[Phase], num_samples: int, cache: IndexCache | None = None
    ) -> None:
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
        """The corpora, for messages."""
        return " + ".join(source.corpus.prefix for source in self.sources)

    @property
    def order_fingerprint(self) -> str:
        """The same for two objects that give the same samples in the same order, else another (SHA-256)."""
        if len(self.sources) == 1:
            return self.sources[0].order_fingerprint
        return _digest([self._described_phases(None), [source.order_fingerprint for source in self.sources]])

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index` of the run.

        Raises:
            IndexError: the run draws no such sample.
            CorpusError: it cannot be read.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self.name}, of which the run draws {self._num_samples}")
        source, number = self.locate(index)
        return self.sources[source][number]._replace(source=source)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number there."""
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
        """How many of the run's first samples are from each source."""
        total = [0] * len(self.sources)
        for phase, interleave in zip(self.phases, self._interleaves, strict=True):
            inside = min(max(0, num_samples - phase.first_sample), interleave.size)
            if inside:
                for source, count in zip(phase.weights, interleave.drawn(inside), strict=True):
                    total[source] += count
        return total

    def state(self, num_samples: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data after `num_samples` samples: a few numbers for each source."""
        consumed = self.consumed(num_samples)
        return {
            "consumed": {s.name: count for s, count in zip(self.sources, consumed, strict=True)},
            "laid_out": {s.name: s.laid_out for s in self.sources},
            "content": {s.name: s.content for s in self.sources},
            "order": {s.name: s.orders[0].order_fingerprint for s in self.sources},
            "phases": self._described_phases(num_samples),
        }

    def difference(self, state: dict[str, Any], num_samples: int) -> tuple[str, Any, Any] | None:
        """What makes these samples others than those that led to `state`; None where they go on from it.

        Returns:
            what differs, its value there, its value here.
        """
        there, here = state["phases"], self._described_phases(num_samples)
        if there != here:
            return f"blend of the first {num_samples} samples", there, here
        mine = self.state(num_samples)
        for name, count in state["consumed"].items():
            for key in ("order", "consumed"):
                if count and state[key].get(name) != mine[key].get(name):
                    return f"{key} of the corpus {name}", state[key].get(name), mine[key].get(name)
            before, now = (one.get("content", {}).get(name) for one in (state, mine))
            if count and before and now and before != now:
                return f"content of the corpus {name}", before[:12], now[:12]
        return None

    def _described_phases(self, before: int | None) -> list[list[Any]]:
        """Start and weights of all phases, or of those that begin before a sample."""
        if len(self.sources) == 1:
            return [[0, {self.sources[0].name: 1.0}]]
        return [
            [phase.first_sample, {self.sources[source].name: weight for source, weight in phase.weights.items()}]
            for phase in self.phases
            if before is None or phase.first_sample < max(before, 1)
        ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
