"""Human-readable text of a corpus and of the samples that training reads from it."""

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
    """Turns token ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class Span(NamedTuple):
    """Consecutive tokens of one sequence of the corpus, or padding."""

    sequence: int | None
    """Number of the sequence; None for padding."""
    offset: int
    """Position in its sequence of the first token that it is made from."""
    length: int
    """Number of these tokens."""
    tokens: npt.NDArray[np.int64]
    """Token ids, [n]."""
    trained: npt.NDArray[np.bool_]
    """True where the token is trained on, as a label, [n]."""
    ends: bool
    """True if the span includes the last token of the sequence."""


def loss_mask_of(corpus: IndexedCorpus) -> IndexedCorpus | None:
    """Open the loss mask of a corpus; None if it has none (see `find_loss_mask`).

    Raises:
        CorpusError: the mask or the sidecar is missing, damaged, or of another corpus.
    """
    read_sidecar_of(corpus)  # a sidecar of another corpus would name that corpus's mask
    found = find_loss_mask(corpus.prefix)
    if found is None:
        return None
    mask = IndexedCorpus(found)
    same = np.array_equal(mask.sequence_lengths, corpus.sequence_lengths) and np.array_equal(
        mask.document_indices, corpus.document_indices
    )
    if not same or mask.dtype != np.uint8:
        raise CorpusError(
            "loss mask", mask.prefix, f"hold one uint8 for every token of {corpus.prefix}", "preprocess again"
        )
    return mask


def document_spans(corpus: IndexedCorpus, mask: IndexedCorpus | None, document: int) -> list[Span]:
    """Return the sequences of a document.

    Raises:
        ConfigError: the corpus has no such document.
    """
    if not 0 <= document < corpus.num_documents:
        raise ConfigError(
            "--documents", document, f"be in [0, {corpus.num_documents})", "pass the number of a document"
        )
    first, stop = corpus.document_indices[document : document + 2].tolist()
    return [_whole_sequence(corpus, mask, sequence) for sequence in range(first, stop)]


def sample_spans(
    corpus: IndexedCorpus,
    pieces: Sequence[Piece],
    starts: npt.NDArray[np.int64],
    tokens: Sequence[int],
    valid: npt.NDArray[np.bool_],
) -> list[Span]:
    """Return the spans of a training sample, in order, padding last.

    Args:
        corpus: source of the sample.
        pieces: its pieces (see `CorpusSamples.pieces`). Fill-in-the-middle may have cut off the last ones.
        starts: positions at which its pieces and its padding start (see `Sample.starts`).
        tokens: its token ids as training reads them, [s + 1].
        valid: True where the label counts, [s]; the first token is no label.
    """
    ids = np.asarray(tokens, np.int64)
    trained = np.append(False, valid)
    spans = []
    edges = itertools.pairwise([0, *starts.tolist(), ids.size])
    for (begin, stop), piece in itertools.zip_longest(edges, pieces[: len(starts) + 1]):
        place = slice(begin, stop)
        if piece is None:
            spans.append(Span(None, 0, 0, ids[place], trained[place], True))
            continue
        ends = piece.offset + piece.length == int(corpus.sequence_lengths[piece.sequence])
        spans.append(Span(piece.sequence, piece.offset, piece.length, ids[place], trained[place], ends))
    return spans


def render(spans: Sequence[Span], decoder: Decoder) -> str:
    """Return the text of the spans, each under a line with its source.

    Tokens that are not trained on are enclosed in ⟦ ⟧. A character whose tokens lie on both sides of a ⟦ or ⟧ shows as
    two.
    """
    lines = []
    for span in spans:
        trained = f"{int(span.trained.sum())} trained on"
        if span.sequence is None:
            lines.append(f"── padding, {span.tokens.size} tokens, {trained}")
            continue
        stop = span.offset + span.length
        end = "ends here" if span.ends else "continues"
        lines.append(f"── sequence {span.sequence}, tokens [{span.offset}, {stop}), {trained}, {end}")
        lines.append("".join(_runs(span.tokens, span.trained, decoder)))
    return "\n".join(lines)


def _runs(tokens: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_], decoder: Decoder) -> Iterator[str]:
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), tokens.size]
    for start, stop in itertools.pairwise(cuts):
        if start < stop:
            text = decoder.decode(tokens[start:stop].tolist())
            yield text if trained[start] else f"{MASKED_OPEN}{text}{MASKED_CLOSE}"


def summary(corpus: IndexedCorpus, mask: IndexedCorpus | None) -> str:
    """Return a table of counts, sizes, quantiles of lengths, and the sidecar's fields."""
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
        return [("sidecar", "none: tokenizer and hashes cannot be checked")]
    ends = [
        f"{name} {index}" for name, index in (("BOS", sidecar.bos_id), ("EOD", sidecar.eod_id)) if index is not None
    ]
    return [
        ("tokenizer", f"{sidecar.tokenizer_fingerprint[:12]}, {sidecar.vocab_size} tokens"),
        ("around documents", ", ".join(ends) or "nothing"),
        ("made by", sidecar.command),
    ]


def _whole_sequence(corpus: IndexedCorpus, mask: IndexedCorpus | None, sequence: int) -> Span:
    tokens = corpus.get(sequence).astype(np.int64)
    trained = np.ones(tokens.size, np.bool_) if mask is None else mask.get(sequence).astype(np.bool_)
    return Span(sequence, 0, tokens.size, tokens, trained, ends=True)
