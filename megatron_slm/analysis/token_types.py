"""Classification of a vocabulary's tokens by their characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TOKEN_TYPES = (
    "digits",
    "punctuation and symbols",
    "white space",
    "word begins",
    "word continues",
    "control",
    "other",
)


def token_types(tokenizer: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Return each id's index into `TOKEN_TYPES`, int8, in the shape of `ids`.

    Args:
        tokenizer: of transformers; None classifies every id as "other".
    """
    table = np.zeros(int(ids.max(initial=0)) + 1, np.int8)
    special_ids = set(getattr(tokenizer, "all_special_ids", ()))
    for number in np.unique(ids).tolist():
        name = "control" if number in special_ids else _type_of(tokenizer, number)
        table[number] = TOKEN_TYPES.index(name)
    return table[ids]


def _type_of(tokenizer: Any, number: int) -> str:
    if tokenizer is None:
        return "other"
    token = str(tokenizer.convert_ids_to_tokens(number))
    text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
    begins_word = token[:1] in ("\N{LOWER ONE EIGHTH BLOCK}", "Ġ") or text[:1].isspace()
    core = text.strip()
    if not core:
        return "white space"
    if all(c.isdigit() or c in ".," for c in core) and any(c.isdigit() for c in core):
        return "digits"
    if not any(c.isalnum() for c in core):
        return "punctuation and symbols" if "\N{REPLACEMENT CHARACTER}" not in core else "other"
    return "word begins" if begins_word else "word continues"
