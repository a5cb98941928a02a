"""Merges the columns of corpora that are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_slm.data.corpus.columns import (
    STORED_DTYPE,
    ColumnSidecar,
    check_columns,
    column_prefix,
    is_column,
    open_column,
    read_column_sidecar,
    save_column_sidecar,
)
from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.data.corpus.indexed import CorpusIndex, IndexedCorpus, idx_path, sidecar_path
from megatron_slm.data.corpus.joined_corpus import Merged
from megatron_slm.data.corpus.sidecar import loss_mask_prefix
from megatron_slm.errors import CorpusError

Concatenate = Callable[[Sequence[str | Path], str | Path], Merged]
"""Writes corpora, in order, as one at a prefix."""


class MergedColumns:
    """The columns of corpora to merge, checked; `write` merges their numbers, `complete` their sidecars.

    Args:
        prefixes: the corpora, in order.
        output_prefix: prefix of the new corpus.
        drop: names of columns to leave out.

    Raises:
        CorpusError: only some corpora have a column; or a column is incomplete, damaged, or was made for other tokens;
            or none of the corpora has a column of `drop`.
    """

    def __init__(self, prefixes: Sequence[str | Path], output_prefix: str | Path, drop: Sequence[str]) -> None:
        self._prefixes, self._output = prefixes, output_prefix
        names_of = [column_names(prefix) for prefix in prefixes]
        found = list(dict.fromkeys(name for names in names_of for name in names))
        for name in drop:
            if name not in found:
                rule = f"be a column of one of the inputs (these have: {', '.join(sorted(found)) or 'none'})"
                raise CorpusError("--drop", name, rule, "check the name")
        self.names = [name for name in found if name not in drop]
        for name in self.names:
            without = [str(prefix) for prefix, names in zip(prefixes, names_of, strict=True) if name not in names]
            if without:
                owner = next(prefix for prefix, names in zip(prefixes, names_of, strict=True) if name in names)
                fix = f"write it for this corpus too (tools/preprocess_data.py --score-key), or add --drop {name}"
                raise CorpusError(f"{without[0]}: column {name}", "none", f"exist, since {owner} has one", fix)
        for prefix in prefixes:
            corpus = IndexedCorpus(prefix)
            for name in self.names:
                open_column(corpus, name)
            check_columns(corpus, self.names)

    def write(self, concatenate: Concatenate) -> None:
        """Merge the numbers. Without the sidecars of `complete`, the columns are incomplete."""
        for name in self.names:
            column = column_prefix(self._output, name)
            sidecar_path(column).unlink(missing_ok=True)  # of a column that this one replaces
            concatenate([column_prefix(prefix, name) for prefix in self._prefixes], column)

    def complete(self) -> None:
        """Write the sidecars, after the new corpus is in place."""
        if not self.names:
            return
        content = content_sha256(IndexedCorpus(self._output))
        for name in self.names:
            parts = [read_column_sidecar(IndexedCorpus(prefix), name) for prefix in self._prefixes]
            sidecar = ColumnSidecar(
                corpus_sha256=content,
                minimum=min(part.minimum for part in parts),
                maximum=max(part.maximum for part in parts),
            )
            save_column_sidecar(self._output, name, sidecar)


def column_names(prefix: str | Path) -> list[str]:
    """List the columns beside a corpus, sorted, incomplete ones included; not those of a corpus with a longer name."""
    corpus = CorpusIndex(prefix)
    start, mask = f"{Path(prefix).name}_", loss_mask_prefix(prefix).name
    beside = sorted(path.name.removesuffix(".idx") for path in idx_path(prefix).parent.glob("*.idx"))
    others = [one for one in beside if one.startswith(start) and one != mask]
    columns = [one for one in others if is_column(Path(prefix).with_name(one)) or _looks_like(corpus, one)]
    corpora = [one for one in others if one not in columns]
    return [one.removeprefix(start) for one in columns if not any(one.startswith(f"{name}_") for name in corpora)]


def _looks_like(corpus: CorpusIndex, file_name: str) -> bool:
    """True for the files of a column whose sidecar is missing: they are no corpus of their own."""
    column = Path(corpus.prefix).with_name(file_name)
    if sidecar_path(column).exists():  # of a corpus
        return False
    index = CorpusIndex(column)
    return index.dtype == STORED_DTYPE and np.array_equal(index.sequence_lengths, corpus.sequence_lengths)
