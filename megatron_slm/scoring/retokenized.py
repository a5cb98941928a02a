"""The samples of a run in the tokens of a reference with another tokenizer, and its losses by the run's tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.reading import PADDING_ID, Piece, Sample
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.errors import ScoreStoreError
from megatron_slm.reference.alignment import Alignment

_KEPT_SEQUENCES = 64


class _Sequence(NamedTuple):
    """A sequence of a corpus in the reference's tokens."""

    ids: npt.NDArray[np.int64]
    alignment: Alignment


class RetokenizedSamples:
    """The samples of a run, tokenized by a reference's tokenizer.

    A sample holds the reference's tokens of the same pieces of text. At a piece's edges a token of the reference may
    reach over them; the losses of whole groups are computed and their share outside of the piece is left out.

    Args:
        samples: the run's samples.
        tokenizer, reference: the run's and the reference's tokenizer.
        special: the reference's id of each special token of the run (end of document, BOS).
        sequence_length: inputs of a sample in the reference's tokens.
    """

    def __init__(
        self,
        samples: BlendedSamples,
        *,
        tokenizer: Tokenizer,
        reference: Tokenizer,
        special: Mapping[int, int],
        sequence_length: int,
    ) -> None:
        self._samples, self._tokenizer, self._reference, self._special = samples, tokenizer, reference, special
        self.sequence_length = sequence_length
        self._sequences: OrderedDict[tuple[int, int], _Sequence] = OrderedDict()

    @property
    def name(self) -> str:
        """Prefixes of the corpora, for messages."""
        return f"{self._samples.name} in the reference's tokens"

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        """Tokenize sample `index` of the run; every label is valid.

        Raises:
            ScoreStoreError: it does not fit, or the run's tokenizer does not give the corpus's tokens.
        """
        parts, starts, filled = [], [], 0
        for sequence, groups, _ in self._pieces(index):
            if filled:
                starts.append(filled)
            parts.append(sequence.ids[sequence.alignment.sources_of(groups)])
            filled += len(parts[-1])
        if filled > self.sequence_length + 1:
            raise ScoreStoreError(
                f"sample {index}: tokens of the reference's tokenizer",
                filled,
                f"be at most {self.sequence_length + 1}, --reference-seq-length and one",
                "raise --reference-seq-length",
            )
        if filled <= self.sequence_length:
            starts.append(filled)
        tokens = np.full(self.sequence_length + 1, PADDING_ID, np.int64)
        tokens[:filled] = np.concatenate(parts)
        return Sample(tokens, np.ones(self.sequence_length, np.bool_), np.array(starts, np.int64))

    def spread(self, index: int, loss_L: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Spread the reference's losses of sample `index` over the run's labels, fp32 [s]; 0 for padding.

        Args:
            loss_L: losses of the labels of `self[index]`, nats, fp32.
        """
        known = np.concatenate([np.zeros(1, np.float32), loss_L])  # the first token is no label
        found = np.zeros(self._samples.sequence_length + 1, np.float32)
        read = written = 0
        for sequence, groups, piece in self._pieces(index):
            count = len(sequence.ids[sequence.alignment.sources_of(groups)])
            losses = sequence.alignment.spread(known[read : read + count], groups)
            first = piece.offset - sequence.alignment.targets_of(groups).start
            found[written : written + piece.length] = losses[first : first + piece.length]
            read, written = read + count, written + piece.length
        return found[1:]

    def _pieces(self, index: int) -> list[tuple[_Sequence, slice, Piece]]:
        """Return for each piece of a sample its sequence, the groups that it touches, and the piece."""
        number, at = self._samples.locate(index)
        source = self._samples.sources[number]
        found = []
        for piece in source.pieces(at):
            if piece.length:
                sequence = self._sequence(number, source.corpus, piece.sequence)
                groups = sequence.alignment.groups_of(piece.offset, piece.offset + piece.length)
                found.append((sequence, groups, piece))
        return found

    def _sequence(self, source: int, corpus: IndexedCorpus, number: int) -> _Sequence:
        key = source, number
        if key in self._sequences:
            self._sequences.move_to_end(key)
        else:
            self._sequences[key] = self._tokenized(corpus, number)
            if len(self._sequences) > _KEPT_SEQUENCES:
                self._sequences.popitem(last=False)
        return self._sequences[key]

    def _tokenized(self, corpus: IndexedCorpus, number: int) -> _Sequence:
        """Tokenize a sequence; special tokens are one character each, and the texts between them are encoded."""
        tokens = corpus.get(number).astype(np.int64)
        ids: list[int] = []
        source_ends: list[int] = []
        target_ends: list[int] = []
        places = np.flatnonzero(np.isin(tokens, list(self._special)))
        begin = length = 0
        for stop in [*places.tolist(), tokens.size]:
            text = self._tokenizer.decode(tokens[begin:stop].tolist()) if stop > begin else ""
            own, ends = self._tokenizer.encode_with_ends(text)
            if own != tokens[begin:stop].tolist():
                raise ScoreStoreError(
                    f"{corpus.prefix}: text of sequence {number}",
                    text if len(text) < 80 else f"{text[:80]}...",
                    "have the tokens of the corpus under the run's tokenizer",
                    "preprocess the corpus again with this tokenizer and --special-tokens-in-text plain",
                )
            theirs, their_ends = self._reference.encode_with_ends(text)
            ids += theirs
            source_ends += [length + end for end in their_ends]
            target_ends += [length + end for end in ends]
            length += len(text)
            if stop < tokens.size:
                length += 1
                ids.append(self._special[int(tokens[stop])])
                source_ends.append(length)
                target_ends.append(length)
            begin = stop + 1
        return _Sequence(np.array(ids, np.int64), Alignment.of(source_ends, target_ends))
