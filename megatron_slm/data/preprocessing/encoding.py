"""Encodes many documents at once into arrays of token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_slm.data.preprocessing.documents import DocumentKeys, InvalidLineError, Texts
from megatron_slm.data.tokenizers.base import Ragged, SpecialTokensInText


class Encoder(Protocol):
    """Turns texts into token ids: a tokenizer, or a faster library checked against one."""

    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        """Return the token ids of several texts, without BOS or EOD."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Settings that turn documents into sequences; pickled to the workers."""

    keys: DocumentKeys
    """Keys of the texts and of the loss mask."""
    bos_id: int | None
    """Prepended to every document that has a token; None: no BOS."""
    eod_id: int | None
    """Appended to every document that has a token; None: no EOD."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that are counted where a text spells them out."""
    special_tokens_in_text: SpecialTokensInText = "plain"
    """Treatment of the special tokens that a text spells out."""

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def count_special(self, document: Sequence[Texts]) -> list[int]:
        """Count the special tokens that the texts of a document spell out, for each corpus.

        Raises:
            InvalidLineError: there is one, and `special_tokens_in_text` is error.
        """
        counts = [0] * len(document)
        for corpus, texts in enumerate(document):
            for found in (match[0] for text in texts.texts for match in self._special.finditer(text)):
                if self.special_tokens_in_text == "error":
                    raise InvalidLineError(f"it spells out the special token {found!r}")
                counts[corpus] += 1
        return counts


class EncodedDocuments(NamedTuple):
    """Documents of one corpus as token ids."""

    tokens: npt.NDArray[np.int32]
    """Token ids of all documents, end to end, int32 [T]."""
    sequence_lengths: npt.NDArray[np.int64]
    """Tokens of every sequence, int64 [S], none 0."""
    sequences_per_document: npt.NDArray[np.int64]
    """Sequences of every document, int64 [D], 0 for a document without a token."""
    loss_mask: npt.NDArray[np.uint8] | None
    """1 for every token that is trained on, uint8 [T]; None without a mask."""
    columns: tuple[npt.NDArray[np.float64], ...] = ()
    """A number for every token, fp64 [T], in the order of `DocumentKeys.score_keys`."""


def encode_documents(documents: Sequence[Texts], encoding: Encoding, encoder: Encoder) -> EncodedDocuments:
    """Tokenize documents of one corpus.

    Without a mask every text is a sequence, as in Megatron's preprocessing: a text without a token is no sequence, and
    a document without a token stays as one without a sequence. With a mask the texts of a document, tokenized one by
    one, form one sequence; its end-of-document token is trained on if its last text is, BOS never. In columns both
    have the number of the token beside them.
    """
    ids, lengths = encoder.encode_ragged([text for document in documents for text in document.texts])
    texts_per_document = np.fromiter((len(document.texts) for document in documents), np.int64, len(documents))
    owner = np.repeat(np.arange(len(documents)), texts_per_document)
    mask = last_trained = None
    if encoding.keys.is_masked:
        trained = np.fromiter((bit for document in documents for bit in document.trained or ()), np.uint8, owner.size)
        mask = np.repeat(trained, lengths)
        last_trained = np.zeros(len(documents), np.uint8)
        last_trained[owner] = trained  # a document's last text overwrites the earlier ones
        lengths = np.bincount(owner, weights=lengths, minlength=len(documents)).astype(np.int64)
        owner = np.arange(len(documents))
    is_sequence = lengths > 0
    lengths, owner = lengths[is_sequence], owner[is_sequence]
    sequences_per_document = np.bincount(owner, minlength=len(documents)).astype(np.int64)
    columns = tuple(
        np.concatenate([np.empty(0), *(document.columns[i] for document in documents)])
        for i in range(len(encoding.keys.score_keys))
    )
    assert all(column.size == ids.size for column in columns), "encoders agree on the tokens of a text"
    encoded = EncodedDocuments(ids, lengths, sequences_per_document, mask, columns)
    return _with_ends(encoded, owner, last_trained, encoding)


def _with_ends(
    encoded: EncodedDocuments,
    owner: npt.NDArray[np.int64],
    last_trained: npt.NDArray[np.uint8] | None,
    encoding: Encoding,
) -> EncodedDocuments:
    """Insert the end-of-document token after every document's last sequence, and BOS before its first."""
    changes = np.flatnonzero(np.diff(owner)) if owner.size else np.empty(0, np.int64)
    ends = np.cumsum(encoded.sequence_lengths)
    lengths = encoded.sequence_lengths.copy()
    places, values, bits, beside = [], [], [], []
    if encoding.eod_id is not None and owner.size:  # before BOS: at one place the earlier document's end comes first
        last = np.append(changes, owner.size - 1)
        lengths[last] += 1
        places.append(ends[last])
        values.append(np.full(last.size, encoding.eod_id, np.int32))
        bits.append(np.ones(last.size, np.uint8) if last_trained is None else last_trained[owner[last]])
        beside.append(ends[last] - 1)
    if encoding.bos_id is not None and owner.size:
        first = np.append(0, changes + 1)
        places.append(np.append(0, ends)[first])
        lengths[first] += 1
        values.append(np.full(first.size, encoding.bos_id, np.int32))
        bits.append(np.zeros(first.size, np.uint8))
        beside.append(places[-1])
    if not places:
        return encoded
    at, neighbors = np.concatenate(places), np.concatenate(beside)
    mask = encoded.loss_mask
    return encoded._replace(
        tokens=np.insert(encoded.tokens, at, np.concatenate(values)),
        sequence_lengths=lengths,
        loss_mask=None if mask is None else np.insert(mask, at, np.concatenate(bits)),
        columns=tuple(np.insert(column, at, column[neighbors]) for column in encoded.columns),
    )
