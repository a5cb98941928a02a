"""Excerpts: texts or a corpus, tokenized and cut into spans that a model reads at once.

Shapes: W spans of s tokens, after a first token that is context and not predicted.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.arithmetic import ceil_div
from megatron_slm.convert.source import Model
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import loss_mask_of
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.data.preprocessing.inputs import expand_inputs
from megatron_slm.errors import AnalysisError
from megatron_slm.hub import local_path

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_SOURCE_KEYS = ("source", "domain", "meta", "subset")
_CONTEXT = 6
"""Preceding tokens to decode together with a token, to find the text it adds."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Source and token texts of one row of an excerpt."""

    source: str
    """Field of the document, else its file name."""
    token_texts: tuple[str, ...] | None = None
    """Text of each of the s + 1 tokens, without padding; None to decode the ids."""
    kinds: tuple[str | None, ...] = ()
    """Part of the document that each token belongs to; empty where the document labels no parts."""


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Token ids of W spans, the same for all models compared."""

    tokens_Ws1: Ints
    """int64 [W, s + 1], padded with 0 at the end."""
    valid_Ws: Bools
    """bool [W, s]: positions with a label that is neither padding nor excluded by the loss mask."""
    spans: tuple[Span, ...]
    tokenizer: Any
    """Tokenizer of transformers; None shows ids instead of text."""
    sample_W: Ints | None = None
    """Sample numbers in a run's order, int64 [W], for excerpts of a store of scores."""

    @property
    def labels_Ws(self) -> Ints:
        """Token predicted at each position, int64 [W, s]."""
        return self.tokens_Ws1[:, 1:]

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.valid_Ws.sum())

    def token_texts(self, row: int) -> list[str]:
        """Return the texts of a span's tokens, up to the last predicted one; joined, they are the span's text."""
        known = self.spans[row].token_texts
        if known is not None:
            return list(known)
        predicted = np.flatnonzero(self.valid_Ws[row])  # a loss mask leaves holes
        count = 1 if predicted.size == 0 else int(predicted[-1]) + 2
        return decode_tokens(self.tokenizer, self.tokens_Ws1[row, :count].tolist())


def decode_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds to the preceding ones; without a tokenizer, the ids themselves."""
    if tokenizer is None:
        return [f"{number} " for number in ids]

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return texts_of_tokens(decode, ids)


def texts_of_tokens(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds to the preceding ones; the last id of a multi-token character adds it all."""
    texts, num_decoded = [], 0  # ids whose text is complete
    for end in range(1, len(ids) + 1):
        start = max(0, num_decoded - _CONTEXT)
        before, after = decode(ids[start:num_decoded]), decode(ids[start:end])
        incomplete = after.endswith("\N{REPLACEMENT CHARACTER}") and end - num_decoded < 4 and end < len(ids)
        texts.append("" if incomplete else after[len(before) :])
        if not incomplete:
            num_decoded = end
    return texts


def load_tokenizer(model: Model | None, folder: str | None) -> Any:
    """Load the tokenizer of `--tokenizer-model`, else the one beside a model's weights.

    Raises:
        AnalysisError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    path = None if folder is None else str(local_path(folder, field="--tokenizer-model", part="tokenizer"))
    if folder is None and model is not None and model.tokenizer_folder is not None:
        path = str(model.tokenizer_folder)
    if path is None:
        raise AnalysisError.missing(
            "--tokenizer-model", "a model folder without a tokenizer", "name a tokenizer folder"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries below raise errors of any kind
        raise AnalysisError(
            "--tokenizer-model", path, f"load as a Hugging Face tokenizer ({error})", "check the folder"
        ) from error


def excerpt_of_texts(
    files: Sequence[str], tokenizer: Any, *, sequence_length: int, max_tokens: int, max_documents: int | None = None
) -> Excerpt:
    """Cut the documents of text files into spans; no span crosses a document boundary.

    Args:
        files: JSON lines (`text`; also `source` or `domain`, and `spans`, a list of [kind, characters]), plain or
            compressed, or .txt files of one document each.
        max_tokens: largest number of predicted tokens.

    Raises:
        AnalysisError: a line is not such a document, or no document has two tokens.
        CorpusError: a file is missing or truncated.
    """
    rows: list[list[int]] = []
    spans: list[Span] = []
    tokens_left = max_tokens
    for number, (record, source) in enumerate(_records(files)):
        if tokens_left <= 0 or (max_documents is not None and number >= max_documents):
            break
        ids, texts, kinds = _tokenized(tokenizer, record)
        for start in range(0, len(ids) - 1, sequence_length):
            stop = min(start + sequence_length + 1, len(ids), start + tokens_left + 1)
            if stop - start < 2:
                break
            rows.append(ids[start:stop])
            spans.append(Span(source=source, token_texts=tuple(texts[start:stop]), kinds=tuple(kinds[start:stop])))
            tokens_left -= stop - start - 1
    if not rows:
        raise AnalysisError("--text-file", list(files), "hold a document of at least two tokens", "use a longer text")
    tokens, valid = _padded(rows, sequence_length)
    return Excerpt(tokens_Ws1=tokens, valid_Ws=valid, spans=tuple(spans), tokenizer=tokenizer)


def excerpt_of_corpus(prefix: str, tokenizer: Any, *, sequence_length: int, max_tokens: int) -> Excerpt:
    """Read the first samples of a Megatron corpus, as an evaluation during training would.

    Documents follow one another; the corpus's loss mask applies if it has one.

    Raises:
        CorpusError: the corpus is missing, damaged or empty.
    """
    corpus = IndexedCorpus(prefix)
    held_out = SequentialSamples(
        corpus, 0, corpus.num_sequences, sequence_length=sequence_length, loss_mask=loss_mask_of(corpus)
    )
    count = min(len(held_out), max(1, ceil_div(max_tokens, sequence_length)))
    samples = [held_out[index] for index in range(count)]
    name = Path(prefix).name
    return Excerpt(
        tokens_Ws1=np.stack([sample.tokens for sample in samples]),
        valid_Ws=np.stack([sample.valid for sample in samples]),
        spans=tuple(Span(source=name) for _ in samples),
        tokenizer=tokenizer,
    )


def _records(files: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every document with its source."""
    for path in expand_inputs(files, "--text-file"):
        if path.suffix == ".txt":
            yield {"text": path.read_text(encoding="utf-8", errors="replace")}, path.name
            continue
        for number, line in enumerate(read_lines(path, "--text-file"), 1):
            if not line.strip():
                continue
            record = _parsed(line, f"{path}: line {number}")
            yield record, _source(record) or path.name


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise AnalysisError(
            place, line[:40].decode(errors="replace"), f"be a JSON object ({error})", "correct the line"
        ) from error
    if not isinstance(record, dict):
        raise AnalysisError(place, type(record).__name__, "be a JSON object", "correct the line")
    if not isinstance(record.get("text"), str):
        raise AnalysisError.missing(f"{place}: text", "a document", "add the field, as a string")
    return record


def _source(record: dict[str, Any]) -> str | None:
    for key in _SOURCE_KEYS:
        value = record.get(key)
        if isinstance(value, dict):
            value = next((v for v in value.values() if isinstance(v, str)), None)
        if isinstance(value, str) and value:
            return value
    return None


def _tokenized(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], list[str], list[str | None]]:
    """Return ids, the text of each, and the part of the document it belongs to (empty without labeled parts)."""
    text = record["text"]
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, decode_tokens(tokenizer, ids), []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max, initial=0))
    texts = [text[start:end] for start, end in pairwise(ends)]
    return list(encoded["input_ids"]), texts, _kinds(ends, record.get("spans") or ())


def _kinds(ends: Sequence[int], labeled: Sequence[tuple[str, int]]) -> list[str | None]:
    """Return the kind of each token's first character, from a document's [kind, characters]."""
    if not labeled:
        return []
    edges = list(accumulate(int(length) for _, length in labeled))
    names = [*(str(kind) for kind, _ in labeled), None]
    return [names[bisect_right(edges, start)] for start in ends[:-1]]


def _padded(rows: Sequence[Sequence[int]], sequence_length: int) -> tuple[Ints, Bools]:
    length = min(sequence_length, max(len(row) for row in rows) - 1)
    tokens = np.zeros((len(rows), length + 1), np.int64)
    valid = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row) - 1] = True
    return tokens, valid
