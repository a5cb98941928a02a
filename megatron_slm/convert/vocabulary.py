"""Rows for new tokens: the only change of a model's shape that an import makes."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.convert.tensors import EMBEDDING, OUTPUT, TensorSource, row_blocks
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import VocabularyError


class ExtendedVocabulary:
    """A `TensorSource` with further rows behind those of the embedding and the output weight.

    A new row is the mean of the rows of the old tokenizer's tokens, so that a new token is at first as likely as
    tokens are on average (nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        source: the model.
        num_tokens: tokens of the old tokenizer; rows behind them stand for no token and are left out of the mean.
        vocab_size: rows there are to be.
    """

    def __init__(self, source: TensorSource, *, num_tokens: int, vocab_size: int) -> None:
        self.source, self.vocab_size = source, vocab_size
        names = [name for name in (EMBEDDING, OUTPUT) if name in source.shapes()]
        self._means = {name: _mean_row(source, name, num_tokens) for name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource.shapes`."""
        shapes = self.source.shapes()
        return shapes | {name: (self.vocab_size, *shapes[name][1:]) for name in self._means}

    def dtypes(self) -> dict[str, torch.dtype]:
        """See `TensorSource.dtypes`."""
        return self.source.dtypes()

    def files(self) -> dict[str, str]:
        """See `TensorSource.files`."""
        return self.source.files()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `TensorSource.rows`."""
        if name not in self._means:
            return self.source.rows(name, start, stop)
        num_old = self.source.shapes()[name][0]
        if start >= num_old:
            return self._means[name].expand(stop - start, -1)
        old = self.source.rows(name, start, min(stop, num_old))
        return torch.cat([old, self._means[name].expand(stop - start - len(old), -1)])


def _mean_row(source: TensorSource, name: str, num_rows: int) -> Tensor:
    shape, dtype = source.shapes()[name], source.dtypes()[name]
    total = torch.zeros(shape[1:], dtype=torch.float64)
    for start, stop in row_blocks((min(num_rows, shape[0]), *shape[1:]), 8):
        total += source.rows(name, start, stop).double().sum(0)
    return (total / min(num_rows, shape[0])).to(dtype)


def check_extends(old: Tokenizer | None, new: Tokenizer, new_name: str) -> None:
    """Make sure that a tokenizer only adds tokens behind another one's.

    Args:
        old: the folder's own tokenizer, None if it has none.

    Raises:
        VocabularyError: there is nothing to compare with, a token is lost, or an id means another one.
    """
    if old is None:
        raise VocabularyError(
            "--extend-vocabulary",
            new_name,
            "extends the tokenizer of the --hf folder, which has none to compare with",
            "copy the model's tokenizer into the folder",
        )
    ours, theirs = old.token_table(), new.token_table()
    for index, token in enumerate(ours):
        found = theirs[index] if index < len(theirs) else "none"
        if found != token and token:  # an id without a token may be given one
            raise VocabularyError(
                "--extend-vocabulary",
                f"id {index} is {found!r} in {new_name}",
                f"keeps every token of the model's tokenizer, where it is {token!r} (of {len(ours)} tokens)",
                "add tokens behind the old ones; another tokenizer needs another embedding, trained anew",
            )
