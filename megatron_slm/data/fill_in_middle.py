"""Fill-in-the-middle (arXiv 2207.14255): documents of a sample with their middle moved to the end, as in Megatron-LM.

A document's text is cut at two random characters into prefix, middle and suffix, each is tokenized by itself, and the
document becomes, with the three tokens P, S and M,

    P prefix S suffix M middle      (PSM)       or      P S suffix M prefix middle      (SPM).

The sample keeps its length: what no longer fits is cut off at its end. Random numbers are a function of the run's seed
and the sample's number, so every layout, resumed run and reading thread turns a sample into the same one.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from megatron_slm.config.fill_in_middle import FillInMiddleConfig
from megatron_slm.config.rules import flag
from megatron_slm.data.reading import Sample
from megatron_slm.data.tokenizers.registry import Tokenizer, require_token

_Ids = npt.NDArray[np.int64]
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_BROKEN = 3
"""Most tokens of an incomplete character: a character has at most four bytes."""


class _Draws:
    """Random numbers of one sample from a counter-based generator, whose bits are the same in every NumPy."""

    def __init__(self, seed: int, stream: int, number: int) -> None:
        counter, key = np.array([0, 0, 0, number], np.uint64), np.array([seed, stream], np.uint64)
        self._bits = np.random.Philox(counter=counter, key=key)

    def _uniform(self) -> float:
        """Draw a number in [0, 1), of 53 bits."""
        return (int(self._bits.random_raw()) >> 11) / 2**53

    def happens(self, rate: float) -> bool:
        """Draw whether something of this probability happens."""
        return self._uniform() < rate

    def below(self, count: int) -> int:
        """Draw a whole number in [0, count)."""
        return int(self._uniform() * count)


_Part: TypeAlias = str | list[int]
"""Text; or the tokens of one character that is no text: a special token, or bytes of a character cut in two."""


@dataclass(frozen=True)
class _Characters:
    """A document as characters that can be cut anywhere."""

    parts: tuple[_Part, ...]

    def __len__(self) -> int:
        return sum(_size(part) for part in self.parts)

    def __getitem__(self, place: slice) -> _Characters:
        """Return the characters [start, stop)."""
        found, at = [], 0
        for part in self.parts:
            begin, end = max(place.start - at, 0), min(place.stop - at, _size(part))
            if begin < end:
                found.append(part[begin:end] if isinstance(part, str) else part)
            at += _size(part)
        return _Characters(tuple(found))

    @property
    def text(self) -> str:
        """The text, without special tokens."""
        return "".join(part for part in self.parts if isinstance(part, str))


def _size(part: _Part) -> int:
    return len(part) if isinstance(part, str) else 1


class _Text:
    """Text of token ids and back, with every special token kept as it is.

    Args:
        tokenizer: a copy encodes text, which spells no special token, whatever it looks like.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._original = tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """Made on first use: many ranks read no sample."""
        tokenizer = copy.deepcopy(self._original)
        tokenizer.special_tokens_are_plain = True
        tokenizer.encode("")  # takes the setting over, which it must not do later, while another thread encodes
        return tokenizer

    @cached_property
    def _special(self) -> _Ids:
        return np.array(sorted(self._original.special_tokens().values()), np.int64)

    def characters(self, ids: _Ids) -> _Characters:
        """Return the characters of token ids, at least one of them."""
        parts: list[_Part] = []
        begin = 0
        for stop in [*np.flatnonzero(np.isin(ids, self._special)).tolist(), ids.size]:
            if begin < stop:
                parts += self._run(ids[begin:stop].tolist())
            if stop < ids.size:
                parts.append([int(ids[stop])])
            begin = stop + 1
        return _Characters(tuple(parts))

    def ids(self, characters: _Characters) -> list[int]:
        """Return the token ids of characters."""
        parts = (self._tokenizer.encode(part) if isinstance(part, str) else part for part in characters.parts)
        return list(itertools.chain.from_iterable(parts))

    def _run(self, ids: list[int]) -> Iterator[_Part]:
        """Yield the text of tokens, between those of characters that the sample's edges cut in two."""
        text = self._tokenizer.decode(ids)
        first = self._broken_at_start(ids) if text[:1] == _BROKEN else 0
        last = len(ids) - (self._broken_at_end(ids[first:]) if text[-1:] == _BROKEN else 0)
        if first:
            yield ids[:first]
        if last - first < len(ids):
            text = self._tokenizer.decode(ids[first:last])
        if text:
            yield text
        if last < len(ids):
            yield ids[last:]

    def _broken_at_start(self, ids: list[int]) -> int:
        """Count the first tokens that have a part of a character only; 0 if the text itself has such a sign."""
        counts = range(1, _MOST_BROKEN + 1)
        return next((n for n in counts if self._tokenizer.decode(ids[n:])[:1] != _BROKEN), 0)

    def _broken_at_end(self, ids: list[int]) -> int:
        counts = range(1, min(_MOST_BROKEN, len(ids)) + 1)
        return next((n for n in counts if self._tokenizer.decode(ids[: len(ids) - n])[-1:] != _BROKEN), 0)


class FillInMiddle:
    """Turns samples into fill-in-the-middle. Every label is valid in a document that was turned.

    Unlike Megatron's, it keeps special tokens and a BOS at a document's start, leaves a document without a token alone
    (and its end in place), and does not damage characters that the sample's edges cut in two.

    Args:
        settings: rates and tokens.
        tokenizer: of the samples.
        eod_id: token that ends a document, beside the ends of the corpus's sequences.
        seed: of the run.

    Raises:
        ConfigError: the tokenizer does not have one of the tokens.
    """

    def __init__(self, settings: FillInMiddleConfig, tokenizer: Tokenizer, *, eod_id: int | None, seed: int) -> None:
        def token_of(name: str) -> int:
            return require_token(tokenizer, getattr(settings, name), flag(name))

        self._settings, self._seed, self._stream = settings, seed, 0
        self._bos_id, self._eod_id, self._split_id = tokenizer.bos_id, eod_id, None
        self._prefix_id, self._middle_id = token_of("fim_prefix_token"), token_of("fim_middle_token")
        self._suffix_id, self._pad_id = token_of("fim_suffix_token"), token_of("fim_pad_token")
        if settings.fim_split_sample is not None:
            self._split_id = token_of("fim_split_sample")
        self._text = _Text(tokenizer)

    def of_set(self, name: str) -> FillInMiddle:
        """Return the same with random numbers of their own for a held-out set."""
        other = copy.copy(self)
        other._stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        return other

    def __call__(self, sample: Sample, number: int) -> Sample:
        """Turn a sample without a loss mask and columns.

        Args:
            number: of the sample in its set.
        """
        counted = np.flatnonzero(sample.valid)
        if not counted.size:
            return sample
        filled = int(counted[-1]) + 2  # without a loss mask, all labels behind the last valid one are padding
        draws = _Draws(self._seed, self._stream, number)
        trained = np.append(True, sample.valid)
        edges = [0, *sample.starts[sample.starts < filled].tolist(), filled]
        ids: list[_Ids] = []
        valid: list[npt.NDArray[np.bool_]] = []
        starts, length, is_turned = [], 0, False
        for begin, end in itertools.pairwise(edges):
            if begin:
                starts.append(length)
            for first, last in _documents(sample.tokens[begin:end], self._eod_id):
                place = slice(begin + first, begin + last)
                turned = self._document(sample.tokens[place], draws)
                is_turned |= turned is not None
                ids.append(sample.tokens[place] if turned is None else turned)
                valid.append(trained[place] if turned is None else np.ones(turned.size, np.bool_))
                length += ids[-1].size
        return self._joined(sample, ids, valid, starts) if is_turned else sample

    def _joined(self, sample: Sample, ids: list[_Ids], valid: list[npt.NDArray[np.bool_]], starts: list[int]) -> Sample:
        """Join documents into a sample of the same length."""
        size = sample.tokens.size
        tokens, trained = np.full(size, self._pad_id, np.int64), np.zeros(size, np.bool_)
        joined = np.concatenate(ids)[:size]
        tokens[: joined.size], trained[: joined.size] = joined, np.concatenate(valid)[:size]
        kept = [start for start in starts if start < joined.size]
        if joined.size < size:
            kept.append(joined.size)
        return sample._replace(tokens=tokens, valid=trained[1:], starts=np.array(kept, np.int64))

    def _document(self, ids: _Ids, draws: _Draws) -> _Ids | None:
        """Turn a document, its end included; None if it stays as it is."""
        first = int(ids[0] == self._bos_id)
        last = ids.size - int(ids[-1] == self._eod_id)
        body = ids[first:last]
        if last <= first:
            return None
        at = np.empty(0, np.int64) if self._split_id is None else np.flatnonzero(body == self._split_id)
        turned = self._fragments(body, at, draws) if at.size else self._turned(body, self._settings.fim_rate, draws)
        return None if turned is None else np.concatenate([ids[:first], turned, ids[last:]])

    def _fragments(self, ids: _Ids, at: npt.NDArray[np.int64], draws: _Draws) -> _Ids | None:
        """Turn the fragments between the separators at some places; None if the document stays as it is."""
        if not draws.happens(self._settings.fim_rate):
            return None
        rate = self._settings.fim_fragment_rate
        assert rate is not None
        found, is_turned = [], False
        for begin, end in itertools.pairwise([-1, *at.tolist(), ids.size]):
            fragment = ids[begin + 1 : end]
            turned = self._turned(fragment, rate, draws) if fragment.size else None
            is_turned |= turned is not None
            found += [fragment if turned is None else turned, ids[end : end + 1]]
        return np.concatenate(found) if is_turned else None

    def _turned(self, ids: _Ids, rate: float, draws: _Draws) -> _Ids | None:
        """Turn tokens into fill-in-the-middle; None if they stay as they are."""
        if not draws.happens(rate):
            return None
        whole = self._text.characters(ids)
        if self._settings.fim_no_prefix is not None and whole.text.startswith(self._settings.fim_no_prefix):
            return None
        first, second = sorted(draws.below(len(whole) + 1) for _ in range(2))
        places = slice(0, first), slice(first, second), slice(second, len(whole))
        prefix, middle, suffix = (self._text.ids(whole[place]) for place in places)
        if draws.happens(self._settings.fim_spm_rate):
            turned = [self._prefix_id, self._suffix_id, *suffix, self._middle_id, *prefix, *middle]
        else:
            turned = [self._prefix_id, *prefix, self._suffix_id, *suffix, self._middle_id, *middle]
        return np.array(turned, np.int64)


def _documents(ids: _Ids, eod_id: int | None) -> Iterator[tuple[int, int]]:
    """Yield the documents [first, last) in a piece of a sequence, each with the token that ends it."""
    ends = [] if eod_id is None else (np.flatnonzero(ids == eod_id) + 1).tolist()
    return ((first, last) for first, last in itertools.pairwise([0, *ends, ids.size]) if first < last)
