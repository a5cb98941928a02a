"""Numbers for the tokens of a document: a list by token, or by spans of characters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.columns import as_stored
from megatron_slm.data.preprocessing.documents import DocumentKeys, InvalidLineError, Texts, value_of
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.errors import CorpusError


def with_columns(texts: Texts, document: Mapping[str, Any], keys: DocumentKeys, tokenizer: Tokenizer) -> Texts:
    """Add the numbers of `keys.score_keys` to the texts of a document.

    A key has one list of numbers a text, `[0.5, 1, ...]` with one number a token, or `[[start, end, number], ...]` with
    spans of characters, the later one first where they overlap; a list of such lists where there is a list of texts.
    A token between spans gets the mean over its characters.

    Raises:
        InvalidLineError: a list does not fit its text, or a number is not finite or too large for float16.
    """
    ends = [tokenizer.encode_with_ends(text)[1] for text in texts.texts]
    several = isinstance(document.get(keys.json_keys[0]), list)
    columns = []
    for key in keys.score_keys:
        value = value_of(document, key)
        lists = value if several else [value]
        if not isinstance(value, list) or len(lists) != len(texts.texts):
            raise InvalidLineError(f"the value of {key!r} is not a list of numbers for each of {len(ends)} texts")
        parts = [
            _numbers(one, key, len(text), own, keys.score_default)
            for one, text, own in zip(lists, texts.texts, ends, strict=True)
        ]
        column = np.concatenate([np.empty(0), *parts])
        try:
            as_stored(column, repr(key))
        except CorpusError as error:
            raise InvalidLineError(f"the value of {key!r} has a number that must {error.rule}") from error
        columns.append(column)
    return texts._replace(columns=tuple(columns))


def _numbers(value: Any, key: str, length: int, ends: list[int], default: float) -> npt.NDArray[np.float64]:
    """Return one number a token, fp64 [T], of a text of `length` characters."""
    if not isinstance(value, list):
        raise InvalidLineError(f"the value of {key!r} is not a list but {type(value).__name__}")
    if value and all(_is_number(entry) for entry in value):
        if len(value) != len(ends):
            raise InvalidLineError(
                f"the value of {key!r} has {len(value)} numbers, but the text has {len(ends)} tokens"
            )
        return np.array(value, np.float64)
    number_C = np.full(length, default)
    for entry in value:
        if not (isinstance(entry, list) and len(entry) == 3 and all(map(_is_number, entry))):
            raise InvalidLineError(f"the value of {key!r} has an entry that is no number and no [start, end, number]")
        start, end, number = entry
        if not (start == int(start) and end == int(end) and 0 <= start < end <= length):
            raise InvalidLineError(
                f"the value of {key!r} has the span [{start}, {end}), which is no span of {length} characters"
            )
        number_C[int(start) : int(end)] = number
    return means(number_C, ends, default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def means(number_C: npt.NDArray[np.float64], ends: list[int], default: float) -> npt.NDArray[np.float64]:
    """Return the mean over the characters of each token, fp64 [T].

    A token without a whole character of its own has the number of the character that it is a part of.
    """
    if not number_C.size:
        return np.full(len(ends), default)
    end_T = np.array(ends, np.int64)
    start_T = np.concatenate([[0], end_T[:-1]]).astype(np.int64)
    sums = np.concatenate([[0.0], np.cumsum(number_C)])
    count_T = end_T - start_T
    inside = number_C[np.minimum(start_T, number_C.size - 1)]
    return np.where(count_T > 1, (sums[end_T] - sums[start_T]) / np.maximum(count_T, 1), inside)
