"""From JSON lines to corpora: one `.bin/.idx` a key, under Megatron's names."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_slm.data.documents import expand_inputs
from megatron_slm.data.encoding import EncodedChunk, Encoding, Invalid, KeyTokens, encode_chunks, line_chunks
from megatron_slm.data.indexed import dtype_for_vocabulary
from megatron_slm.data.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.sidecar import Sidecar, write_sidecar
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError

_REPORTED_INVALID_LINES = 100


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What `tools/preprocess_data.py` is asked for; the names are its flags'."""

    input: tuple[str, ...]
    """Files of JSON lines (plain, .gz, .zst) or patterns; read in this order."""

    output_prefix: str
    """The corpora are `{output_prefix}_{key}_document.bin` and `.idx`."""

    tokenizer_type: str
    """See `build_tokenizer`."""

    tokenizer_model: str | None = None
    """See `build_tokenizer`."""

    vocab_size: int | None = None
    """For NullTokenizer."""

    json_keys: tuple[str, ...] = ("text",)
    """The keys whose texts are tokenized, one corpus each."""

    append_eod: bool = False
    """End every document that has a token with the end-of-document token."""

    workers: int = 1
    """Processes that tokenize; the corpora do not depend on it."""

    on_error: str = "stop"
    """`stop` at the first line that is not a document, or `skip` such lines."""

    command: str = ""
    """The command line, for the sidecar."""

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ConfigError("on_error", self.on_error, "must be stop or skip", "choose one of them")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(
                "json_keys",
                self.json_keys,
                "must be at least one key, none of them twice",
                "name each key once",
            )

    def corpus_prefix(self, key: str) -> str:
        """Prefix of one key's corpus."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class PreprocessReport:
    """What was read and written so far; complete when `preprocess` returns it."""

    num_documents: int = 0
    """Lines that are documents, those without a token included."""

    num_empty: dict[str, int] = field(default_factory=dict)
    """Documents without a token, by key."""

    num_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens, by key."""

    longest_document: dict[str, int] = field(default_factory=dict)
    """Tokens of the longest document, by key."""

    num_invalid: int = 0
    """Lines that were skipped."""

    invalid: list[Invalid] = field(default_factory=list)
    """The first of them."""

    num_bytes: int = 0
    """Size of the lines read, decompressed."""

    seconds: float = 0.0
    """Time spent."""


def preprocess(
    config: PreprocessConfig, on_progress: Callable[[PreprocessReport], None] = lambda _: None
) -> PreprocessReport:
    """Tokenize the input and write the corpora, each with its sidecar.

    Nothing is left at the output prefixes if this raises, but for corpora that were there before.

    Args:
        config: what to do.
        on_progress: called after every chunk of documents.

    Raises:
        ConfigError: the tokenizer or a number cannot be used.
        CorpusError: the input cannot be read, has an invalid line (with `on_error` stop), or no token.
    """
    started = time.monotonic()
    files = expand_inputs(config.input)
    encoding = Encoding(
        keys=config.json_keys,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
        append_eod=config.append_eod,
    )
    tokenizer = encoding.tokenizer()
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    report = PreprocessReport(
        num_empty=dict.fromkeys(config.json_keys, 0),
        num_tokens=dict.fromkeys(config.json_keys, 0),
        longest_document=dict.fromkeys(config.json_keys, 0),
    )
    with contextlib.ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedCorpusWriter(config.corpus_prefix(key), dtype)) for key in config.json_keys
        }
        chunks = stack.enter_context(contextlib.closing(encode_chunks(line_chunks(files), encoding, config.workers)))
        for chunk in chunks:
            _take_invalid(chunk, config, report)
            for key, tokens in zip(config.json_keys, chunk.keys, strict=True):
                _take_tokens(key, tokens, writers[key], report)
            report.num_documents += chunk.num_documents
            report.num_bytes += chunk.num_bytes
            report.seconds = time.monotonic() - started
            on_progress(report)
        _require_tokens(files, report)
    _write_sidecars(config, tokenizer, writers)
    report.seconds = time.monotonic() - started
    return report


def _take_invalid(chunk: EncodedChunk, config: PreprocessConfig, report: PreprocessReport) -> None:
    if chunk.invalid and config.on_error == "stop":
        first = chunk.invalid[0]
        raise CorpusError(
            "input",
            f"{first.path}:{first.line}",
            f"every line must be a document: {first.reason}",
            "mend the line, or leave such lines out with --on-error skip",
        )
    report.num_invalid += len(chunk.invalid)
    report.invalid += chunk.invalid[: max(0, _REPORTED_INVALID_LINES - len(report.invalid))]


def _take_tokens(key: str, encoded: KeyTokens, writer: IndexedCorpusWriter, report: PreprocessReport) -> None:
    sequences = np.split(encoded.tokens, np.cumsum(encoded.sequence_lengths)[:-1])
    start = 0
    for count in encoded.sequences_per_document.tolist():
        writer.add_document(sequences[start : start + count])
        start += count
    report.num_empty[key] += int((encoded.sequences_per_document == 0).sum())
    report.num_tokens[key] = writer.num_tokens
    report.longest_document[key] = writer.longest_document


def _require_tokens(files: Sequence[Path], report: PreprocessReport) -> None:
    """All corpora or none: checked for every key before the first is put in place."""
    for key, num_tokens in report.num_tokens.items():
        if num_tokens == 0:
            raise CorpusError(
                "input",
                ", ".join(map(str, files)),
                f"must hold a text with tokens under {key!r} ({report.num_documents} documents were read)",
                "check the files and --json-keys",
            )


def _write_sidecars(config: PreprocessConfig, tokenizer: Tokenizer, writers: dict[str, IndexedCorpusWriter]) -> None:
    fingerprint = tokenizer.fingerprint()
    for key, writer in writers.items():
        sidecar = Sidecar(
            tokenizer_fingerprint=fingerprint,
            vocab_size=tokenizer.vocab_size,
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            max_token_id=writer.max_token_id or 0,
            eod_id=tokenizer.eod_id if config.append_eod else None,
            command=config.command,
        )
        write_sidecar(config.corpus_prefix(key), sidecar)
