"""A fixed sample of tokens to look at: texts or a corpus, cut into windows that a model reads.

Shapes: W windows of s tokens (and one more, the first, which is given and not predicted); N = W * s.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.convert.source import Model
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import loss_mask_of
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.data.preprocessing.inputs import expand_inputs
from megatron_slm.errors import AnalysisError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_SOURCE_KEYS = ("source", "domain", "meta", "subset")
_CONTEXT = 6
"""Tokens before a token that are decoded with it, to see the text that it adds."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What belongs to one window beside its ids."""

    source: str
    """Where it comes from: a field of the document, else its file."""
    pieces: tuple[str, ...] | None = None
    """The text of each of its s + 1 tokens, without padding; None: decode the ids."""
    kinds: tuple[str | None, ...] = ()
    """What each token is part of, where the document says so."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Windows of tokens; the same for every model that is looked at."""

    tokens_Ws1: Ints
    """int64 [W, s + 1]; padded at the end with 0."""
    valid_Ws: Bools
    """bool [W, s]: labels that count: those that are there and that no loss mask leaves out."""
    windows: tuple[Window, ...]
    tokenizer: Any
    """Of transformers; None for ids without a text."""
    sample_W: Ints | None = None
    """Numbers in the order of a run, for samples that stores of scores know."""

    @property
    def labels_Ws(self) -> Ints:
        """The token that each position predicts."""
        return self.tokens_Ws1[:, 1:]

    @property
    def num_tokens(self) -> int:
        """Tokens with a loss."""
        return int(self.valid_Ws.sum())

    def pieces(self, window: int) -> list[str]:
        """The text of a window's tokens, from the first one to the last that is predicted; they join to its text."""
        known = self.windows[window].pieces
        if known is not None:
            return list(known)
        predicted = np.flatnonzero(self.valid_Ws[window])  # a loss mask leaves holes
        count = 1 if predicted.size == 0 else int(predicted[-1]) + 2
        return decode_pieces(self.tokenizer, self.tokens_Ws1[window, :count].tolist())


def decode_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each id adds to the ones before, by a tokenizer of transformers; the ids themselves of None."""
    if tokenizer is None:
        return [f"{number} " for number in ids]

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return pieces_of(decode, ids)


def pieces_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each id adds to the ones before; a character made of several ids comes with the last one."""
    pieces, shown = [], 0  # ids before `shown` have been given as text
    for end in range(1, len(ids) + 1):
        start = max(0, shown - _CONTEXT)
        before, after = decode(ids[start:shown]), decode(ids[start:end])
        incomplete = after.endswith("\N{REPLACEMENT CHARACTER}") and end - shown < 4 and end < len(ids)
        pieces.append("" if incomplete else after[len(before) :])
        if not incomplete:
            shown = end
    return pieces


def load_tokenizer(model: Model | None, folder: str | None) -> Any:
    """The tokenizer of `--tokenizer-model`, or the one beside a model's weights.

    Raises:
        AnalysisError: there is none.
    """
    from transformers import AutoTokenizer

    place = Path(folder) if folder is not None else None if model is None else model.tokenizer_folder
    if place is None:
        raise AnalysisError(
            "--tokenizer-model", None, "is given where the model's folder holds no tokenizer", "name its folder"
        )
    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # the libraries below raise anything
        raise AnalysisError(
            "--tokenizer-model", str(place), f"loads as a Hugging Face tokenizer ({error})", "check the folder"
        ) from error


def sample_texts(
    files: Sequence[str], tokenizer: Any, *, sequence_length: int, max_tokens: int, max_documents: int | None = None
) -> Sample:
    """Cut the documents of text files into windows; no window spans two documents.

    Args:
        files: JSON lines (`text`; also `source` or `domain`, and `spans`, a list of [kind, characters]), plain or
            compressed, or .txt files, each of which is one document.
        max_tokens: stop after this many predicted tokens.

    Raises:
        AnalysisError: a line is not such a document, or there are no two tokens in the files.
        CorpusError: a file is missing or cut off.
    """
    rows: list[list[int]] = []
    windows: list[Window] = []
    left = max_tokens
    for number, (record, source) in enumerate(_records(files)):
        if left <= 0 or (max_documents is not None and number >= max_documents):
            break
        ids, pieces, kinds = _tokenized(tokenizer, record)
        for start in range(0, len(ids) - 1, sequence_length):
            stop = min(start + sequence_length + 1, len(ids), start + left + 1)
            if stop - start < 2:
                break
            rows.append(ids[start:stop])
            windows.append(
                Window(source=source, pieces=tuple(pieces[start:stop]), kinds=tuple(kinds[start:stop]) if kinds else ())
            )
            left -= stop - start - 1
    if not rows:
        raise AnalysisError("--text-file", list(files), "holds a document of two tokens or more", "give more text")
    tokens, valid = _padded(rows, sequence_length)
    return Sample(tokens_Ws1=tokens, valid_Ws=valid, windows=tuple(windows), tokenizer=tokenizer)


def sample_corpus(prefix: str, tokenizer: Any, *, sequence_length: int, max_tokens: int) -> Sample:
    """The first windows of a Megatron corpus, as training evaluates a held-out one: documents after each other, and
    under the corpus' loss mask where it has one.

    Raises:
        CorpusError: the corpus is missing, damaged or empty.
    """
    corpus = IndexedCorpus(prefix)
    held_out = SequentialSamples(
        corpus, 0, corpus.num_sequences, sequence_length=sequence_length, loss_mask=loss_mask_of(corpus)
    )
    count = min(len(held_out), max(1, -(-max_tokens // sequence_length)))
    samples = [held_out[index] for index in range(count)]
    name = Path(prefix).name
    return Sample(
        tokens_Ws1=np.stack([sample.tokens for sample in samples]),
        valid_Ws=np.stack([sample.valid for sample in samples]),
        windows=tuple(Window(source=name) for _ in samples),
        tokenizer=tokenizer,
    )


def _records(files: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for path in expand_inputs(files, "--text-file"):
        if path.suffix == ".txt":
            yield {"text": path.read_text(encoding="utf-8", errors="replace")}, path.name
            continue
        for number, line in enumerate(read_lines(path, "--text-file"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise AnalysisError(f"{path}: line {number}", str(error), "is a JSON object", "mend it") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise AnalysisError(f"{path}: line {number}", "no text", "has a text under `text`", "mend the line")
            yield record, _source(record) or path.name


def _source(record: dict[str, Any]) -> str | None:
    for key in _SOURCE_KEYS:
        value = record.get(key)
        if isinstance(value, dict):
            value = next((v for v in value.values() if isinstance(v, str)), None)
        if isinstance(value, str) and value:
            return value
    return None


def _tokenized(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], list[str], list[str | None]]:
    """Ids, the text of each, and what each is part of (empty where the document does not say)."""
    text = record["text"]
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, decode_pieces(tokenizer, ids), []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max, initial=0))
    pieces = [text[start:end] for start, end in pairwise(ends)]
    return list(encoded["input_ids"]), pieces, _kinds(ends, record.get("spans") or ())


def _kinds(ends: Sequence[int], spans: Sequence[tuple[str, int]]) -> list[str | None]:
    """What the first character of each token is part of, by the document's spans."""
    if not spans:
        return []
    edges = list(accumulate(int(length) for _, length in spans))
    names = [*(str(kind) for kind, _ in spans), None]
    return [names[bisect_right(edges, start)] for start in ends[:-1]]


def _padded(rows: Sequence[Sequence[int]], sequence_length: int) -> tuple[Ints, Bools]:
    length = min(sequence_length, max(len(row) for row in rows) - 1)
    tokens = np.zeros((len(rows), length + 1), np.int64)
    valid = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row) - 1] = True
    return tokens, valid


@dataclass(frozen=True)
class TokenTypes:
    """The type of every id of a vocabulary: what it is made of, and whether it begins a word."""

    names: tuple[str, ...] = field(
        default=(
            "digits", "punctuation and symbols", "white space", "word begins", "word goes on", "control", "other",
        )
    )  # fmt: skip

    def of(self, tokenizer: Any, ids: Ints) -> npt.NDArray[np.int8]:
        """The number of each id's type, the shape of `ids`."""
        table = np.zeros(int(ids.max(initial=0)) + 1, np.int8)
        specials = set(getattr(tokenizer, "all_special_ids", ()))
        for number in np.unique(ids).tolist():
            table[number] = self.names.index(_type_of(tokenizer, number, number in specials))
        return table[ids]


def _type_of(tokenizer: Any, number: int, special: bool) -> str:
    if special:
        return "control"
    if tokenizer is None:
        return "other"
    token = str(tokenizer.convert_ids_to_tokens(number))
    text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
    begins = token[:1] in ("\N{LOWER ONE EIGHTH BLOCK}", "Ġ") or text[:1].isspace()
    core = text.strip()
    if not core:
        return "white space"
    if all(c.isdigit() or c in ".," for c in core) and any(c.isdigit() for c in core):
        return "digits"
    if not any(c.isalnum() for c in core):
        return "punctuation and symbols" if "\N{REPLACEMENT CHARACTER}" not in core else "other"
    return "word begins" if begins else "word goes on"
