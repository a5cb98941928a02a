"""What a corpus holds and what training reads of it, as text for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path
from megatron_slm.data.corpus.sidecar import Sidecar, find_loss_mask, read_sidecar_of
from megatron_slm.data.reading import Piece
from megatron_slm.errors import ConfigError, CorpusError

MASKED_OPEN, MASKED_CLOSE = "⟦", "⟧"


class Decoder(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class Part(NamedTuple):
    """Consecutive tokens of one sequence of the corpus, or padding."""

    sequence: int | None
    """Which; None for padding."""
    offset: int
    """Its first token here."""
    tokens: npt.NDArray[np.int64]
    """Their ids, [n]."""
    trained: npt.NDArray[np.bool_]
    """Whether the token is trained on, as a label, [n]."""
    ends: bool
    """Whether the sequence's last token is among them."""


def loss_mask_of(corpus: IndexedCorpus) -> IndexedCorpus | None:
    """The corpus' loss mask, if it has one (see `find_loss_mask`).

    Raises:
        CorpusError: it is missing, damaged, or of another corpus; or the sidecar is.
    """
    read_sidecar_of(corpus)  # one of another corpus would name its mask
    found = find_loss_mask(corpus.prefix)
    if found is None:
        return None
    mask = IndexedCorpus(found)
    same = np.array_equal(mask.sequence_lengths, corpus.sequence_lengths) and np.array_equal(
        mask.document_indices, corpus.document_indices
    )
    if not same or mask.dtype != np.uint8:
        raise CorpusError(
            "loss mask", mask.prefix, f"must hold one uint8 for every token of {corpus.prefix}", "preprocess again"
        )
    return mask


def document_parts(corpus: IndexedCorpus, mask: IndexedCorpus | None, document: int) -> list[Part]:
    """The sequences of a document.

    Raises:
        ConfigError: there is no such document.
    """
    if not 0 <= document < corpus.num_documents:
        raise ConfigError(
            "documents", document, f"must be within [0, {corpus.num_documents})", "give the number of a document"
        )
    first, stop = corpus.document_indices[document : document + 2].tolist()
    return [_part(corpus, mask, sequence, 0, int(corpus.sequence_lengths[sequence])) for sequence in range(first, stop)]


def sample_parts(
    corpus: IndexedCorpus, pieces: Sequence[Piece], tokens: Sequence[int], valid: npt.NDArray[np.bool_]
) -> list[Part]:
    """What a sample of training is made of, in order, padding last.

    Args:
        corpus: where it is from.
        pieces: what it is made of (see `pieces` of its samples).
        tokens: all of them, [s + 1], as training reads them.
        valid: whether each label counts, [s]; the first token is no label.
    """
    ids, trained, filled = np.asarray(tokens, np.int64), np.append(False, valid), 0
    parts = []
    for piece in pieces:
        place = slice(filled, filled + piece.length)
        ends = piece.offset + piece.length == int(corpus.sequence_lengths[piece.sequence])
        parts.append(Part(piece.sequence, piece.offset, ids[place], trained[place], ends))
        filled += piece.length
    if filled < ids.size:
        parts.append(Part(None, 0, ids[filled:], trained[filled:], True))
    return parts


def render(parts: Sequence[Part], decoder: Decoder) -> str:
    """Text of the parts, one below the other: a line that says where each is from, then its text.

    What is not trained on stands within ⟦ ⟧. A character that spans tokens on both sides of a border shows as two.
    """
    lines = []
    for part in parts:
        if part.sequence is None:
            lines.append(f"── padding, {part.tokens.size} tokens, {int(part.trained.sum())} trained on")
            continue
        stop = part.offset + part.tokens.size
        end = "ends here" if part.ends else "goes on"
        lines.append(
            f"── sequence {part.sequence}, tokens [{part.offset}, {stop}), {int(part.trained.sum())} trained on, {end}"
        )
        lines.append("".join(_runs(part.tokens, part.trained, decoder)))
    return "\n".join(lines)


def _runs(tokens: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_], decoder: Decoder) -> Iterator[str]:
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), tokens.size]
    for start, stop in itertools.pairwise(cuts):
        if start < stop:
            text = decoder.decode(tokens[start:stop].tolist())
            yield text if trained[start] else f"{MASKED_OPEN}{text}{MASKED_CLOSE}"


def summary(corpus: IndexedCorpus, mask: IndexedCorpus | None) -> str:
    """Counts, sizes, the spread of lengths, and what the sidecar says."""
    bounds = np.append(0, np.cumsum(corpus.sequence_lengths, dtype=np.int64))
    lengths = np.diff(bounds[corpus.document_indices])
    size = sum(path(corpus.prefix).stat().st_size for path in (bin_path, idx_path))
    quantiles = np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1)).astype(int).tolist() if lengths.size else []
    rows = [
        ("corpus", corpus.prefix),
        ("size", f"{size / 1e6:.1f} MB, {corpus.dtype.name}"),
        ("documents", f"{corpus.num_documents} ({int((lengths == 0).sum())} without a token)"),
        ("sequences", f"{corpus.num_sequences}"),
        ("tokens", f"{corpus.num_tokens}"),
        ("document lengths", "min {} / 5 % {} / median {} / 95 % {} / max {}".format(*quantiles)),
        ("largest token id", f"{corpus.max_token_id()}"),
    ]
    if mask is not None:
        trained = int(np.memmap(bin_path(mask.prefix), mode="r", dtype=np.uint8).sum(dtype=np.int64))
        rows.append(("trained on", f"{trained} tokens ({100 * trained / corpus.num_tokens:.1f} %)"))
    rows += _sidecar_rows(read_sidecar_of(corpus))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _sidecar_rows(sidecar: Sidecar | None) -> list[tuple[str, str]]:
    if sidecar is None:
        return [("sidecar", "none: its tokenizer and its hashes cannot be checked")]
    ends = [
        f"{name} {index}" for name, index in (("BOS", sidecar.bos_id), ("EOD", sidecar.eod_id)) if index is not None
    ]
    return [
        ("tokenizer", f"{sidecar.tokenizer_fingerprint[:12]}, {sidecar.vocab_size} tokens"),
        ("around documents", ", ".join(ends) or "nothing"),
        ("made by", sidecar.command),
    ]


def _part(corpus: IndexedCorpus, mask: IndexedCorpus | None, sequence: int, offset: int, count: int) -> Part:
    trained = np.ones(count, np.bool_) if mask is None else mask.get(sequence, offset, count).astype(np.bool_)
    ends = offset + count == int(corpus.sequence_lengths[sequence])
    return Part(sequence, offset, corpus.get(sequence, offset, count).astype(np.int64), trained, ends)
