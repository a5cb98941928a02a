"""Vocabulary extension: rows for new tokens, the only change an import makes to a model's shape."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from megatron_slm.convert.tensors import EMBEDDING, OUTPUT, TensorSource, row_blocks
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import VocabularyError

ExtendInit = Literal["mean", "keep"]
"""Rows of new tokens that the matrix has already, as padding: the mean row, or the values as stored."""


class ExtendedVocabulary:
    """`TensorSource` that gives rows to new tokens, behind those of another one or in its padding.

    New rows are the mean of the rows of the old tokenizer's tokens, so that a new token starts with an average
    probability (nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        source: the model.
        num_tokens: tokens of the old tokenizer; later rows are unused padding and excluded from the mean.
        vocab_size: rows after the extension.
        replaced: rows of new tokens within the matrix, which get the mean too.
    """

    def __init__(
        self, source: TensorSource, *, num_tokens: int, vocab_size: int, replaced: Collection[int] = ()
    ) -> None:
        self.source, self.vocab_size, self._replaced = source, vocab_size, sorted(replaced)
        names = [name for name in (EMBEDDING, OUTPUT) if name in source.shapes()]
        self._means = {name: _mean_row(source, name, num_tokens) for name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, after the extension."""
        shapes = self.source.shapes()
        return shapes | {name: (self.vocab_size, *shapes[name][1:]) for name in self._means}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of every tensor by name."""
        return self.source.dtypes()

    def files(self) -> dict[str, str]:
        """Return the path of the file that holds each tensor, by tensor name."""
        return self.source.files()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along the first dimension; rows of new tokens are the mean row."""
        if name not in self._means:
            return self.source.rows(name, start, stop)
        num_old = self.source.shapes()[name][0]
        if start >= num_old:
            return self._means[name].expand(stop - start, -1)
        old = self.source.rows(name, start, min(stop, num_old))
        within = [row - start for row in self._replaced if start <= row < start + len(old)]
        if within:
            old = old.clone()
            old[within] = self._means[name]
        return torch.cat([old, self._means[name].expand(stop - start - len(old), -1)])


def new_tokens(old: Tokenizer, new: Tokenizer) -> list[int]:
    """Return the ids that mean a token in `new` and none in `old`, rising."""
    old_tokens = old.token_table()
    return [
        index
        for index, token in enumerate(new.token_table())
        if token and not (old_tokens[index : index + 1] or [""])[0]
    ]


def _mean_row(source: TensorSource, name: str, num_rows: int) -> Tensor:
    shape, dtype = source.shapes()[name], source.dtypes()[name]
    total = torch.zeros(shape[1:], dtype=torch.float64)
    for start, stop in row_blocks((min(num_rows, shape[0]), *shape[1:]), 8):
        total += source.rows(name, start, stop).double().sum(0)
    return (total / min(num_rows, shape[0])).to(dtype)


def check_extends(old: Tokenizer | None, new: Tokenizer, new_name: str) -> None:
    """Check that a tokenizer only appends tokens to another one.

    Args:
        old: the folder's own tokenizer, None if it has none.
        new_name: the argument of --extend-vocabulary.

    Raises:
        VocabularyError: there is no old tokenizer, or one of its tokens is missing or has another id.
    """
    if old is None:
        raise VocabularyError.missing(
            "--hf: tokenizer", "--extend-vocabulary", "copy the model's tokenizer into the --hf folder"
        )
    old_tokens, new_tokens = old.token_table(), new.token_table()
    for index, token in enumerate(old_tokens):
        found = new_tokens[index] if index < len(new_tokens) else None
        if found != token and token:  # an unused id may get a token
            raise VocabularyError(
                f"--extend-vocabulary: token {index} of {new_name}",
                found,
                f"be {token!r}, because all {len(old_tokens)} tokens of the model's tokenizer keep their ids",
                "append new tokens only; a different tokenizer needs a model trained with it",
            )
