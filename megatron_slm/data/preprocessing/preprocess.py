"""Tokenizes text into corpora: one `.bin` and `.idx` per key, under Megatron's names."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_slm.data.corpus.columns import column_prefix, write_column_sidecar
from megatron_slm.data.corpus.indexed import CorpusIndex, dtype_for_vocabulary
from megatron_slm.data.corpus.joined_corpus import JoinedCorpus, Merged
from megatron_slm.data.corpus.sidecar import Sidecar, loss_mask_prefix
from megatron_slm.data.preprocessing.documents import MISSING_KEY, DocumentKeys
from megatron_slm.data.preprocessing.encoding import Encoder, Encoding
from megatron_slm.data.preprocessing.fast_encoder import LIBRARY, FastEncoder, FastEncoderError
from megatron_slm.data.preprocessing.inputs import Chunk, Inputs
from megatron_slm.data.preprocessing.parts_folder import clear, parts_folder
from megatron_slm.data.preprocessing.shards import REPORTED_INVALID_LINES, CorpusCounts, Shard, ShardWriter, make_shards
from megatron_slm.data.tokenizers.base import SpecialTokensInText, Tokenizer
from megatron_slm.data.tokenizers.registry import require_token
from megatron_slm.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)

_FALLBACK = "NOT using the fast tokenizer: %s. The tokenizer encodes everything."


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings of a preprocessing run, under the names of the flags of `tools/preprocess_data.py`."""

    input: tuple[str, ...]
    """Files (JSON lines, plain, .gz or .zst; .parquet) or patterns, read in this order; `-` is standard input."""
    output_prefix: str
    """Prefix of the corpora, `{output_prefix}_{key}_document.bin` and `.idx`."""
    keys: DocumentKeys = field(default_factory=DocumentKeys)
    """Keys of the texts and of the loss mask."""
    append_eod: bool = False
    """End every document that has a token with the end-of-document token."""
    prepend_bos: bool = False
    """Begin every document that has a token with the beginning-of-text token."""
    eod_token: str | None = None
    """The end-of-document token; None: the tokenizer's own."""
    special_tokens_in_text: SpecialTokensInText = "plain"
    """Treatment of special tokens that a text spells out: `parse` as the token, `plain` as characters, or `error`."""
    workers: int = 1
    """Processes that tokenize; the corpora do not depend on the number."""
    fast_tokenizer: bool = False
    """Encode with a faster library, checked against the tokenizer on samples."""
    on_error: str = "stop"
    """`stop` at the first invalid line, or `skip` invalid lines."""
    command: str = ""
    """The command line, recorded in the sidecar."""

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ConfigError("--on-error", self.on_error, "be stop or skip", "choose one of them")
        if self.special_tokens_in_text not in ("parse", "plain", "error"):
            rule = "be parse, plain or error"
            raise ConfigError("--special-tokens-in-text", self.special_tokens_in_text, rule, "choose one of them")
        if self.eod_token is not None and not self.append_eod:
            raise ConfigError.missing("--append-eod", "--eod-token", "add it, or remove --eod-token")
        if self.workers < 1:
            raise ConfigError("--workers", self.workers, "be at least 1", "use one process or more")

    def corpus_prefix(self, key: str) -> str:
        """Return the prefix of one key's corpus."""
        return f"{self.output_prefix}_{key}_document"

    @property
    def parts_folder(self) -> Path:
        """Folder of the finished shards, removed when the corpora are complete."""
        return Path(f"{self.output_prefix}.parts")


class InvalidLineOfFile(NamedTuple):
    """A line that is not a document."""

    source: str
    """Path of the file."""
    line: int
    """Number of the line, from 1; in a table, of the row."""
    reason: str


@dataclass
class PreprocessReport:
    """Counts of the input read and the corpora written so far; final when `preprocess` returns."""

    corpora: dict[str, CorpusCounts] = field(default_factory=dict)
    """Counts by key."""
    num_documents: int = 0
    """Valid lines, documents without a token included."""
    num_invalid: int = 0
    """Invalid lines, which were skipped."""
    invalid: list[InvalidLineOfFile] = field(default_factory=list)
    """The first `REPORTED_INVALID_LINES` invalid lines."""
    num_bytes: int = 0
    """Size of the lines read, decompressed."""
    num_resumed_bytes: int = 0
    """Part of `num_bytes` that an earlier run tokenized."""
    input_bytes: int = 0
    """Part of the input's size on disk that is done."""
    total_input_bytes: int | None = None
    """Size of the input on disk; None if unknown."""
    seconds: float = 0.0
    """Time since the start of this run."""
    made: set[str] = field(default_factory=set)
    """Names of the shards; equal chunks share one."""
    eod: str | None = None
    """Text and id of the token that ends documents; None: none does."""
    encoder: str = "tokenizer"
    """`tokenizer`, or the name of the faster library."""

    @property
    def bytes_per_second(self) -> float:
        """Throughput of this run, without the bytes of an earlier run."""
        return (self.num_bytes - self.num_resumed_bytes) / max(self.seconds, 1e-9)


OnProgress = Callable[[PreprocessReport], None]


def preprocess(
    config: PreprocessConfig, tokenizer: Tokenizer, on_progress: OnProgress = lambda _: None
) -> PreprocessReport:
    """Tokenize the input and write the corpora, each with its sidecar.

    If this raises, earlier corpora at the output prefixes stay unchanged, and finished shards stay in
    `config.parts_folder`: the same call resumes from them, and another call ignores them.

    Args:
        config: the settings.
        tokenizer: encodes the texts.
        on_progress: called after every chunk of the input.

    Raises:
        ConfigError: the tokenizer lacks a token, a worker was killed, or another process writes to this prefix.
        CorpusError: the input cannot be read, has an invalid line (with `on_error` stop), or has no token.
    """
    inputs = Inputs(config.input)
    for path, times in Counter(path.resolve() for path in inputs.files).items():
        if times > 1:
            logger.warning("%s is named %d times: its documents are written as often", path, times)
    tokenizer.special_tokens_are_plain = config.special_tokens_in_text != "parse"
    encoding = _encoding(config, tokenizer)
    with parts_folder(config.parts_folder):
        encoder = _fast_encoder(tokenizer) if config.fast_tokenizer else None
        if encoder is not None:
            try:
                return _preprocess(config, tokenizer, encoding, encoder, inputs, on_progress)
            except FastEncoderError as error:
                if not inputs.files:  # standard input cannot be read again
                    raise ConfigError(
                        "--fast-tokenizer", LIBRARY, f"agree with the tokenizer ({error})", "remove --fast-tokenizer"
                    ) from error
                logger.warning(_FALLBACK, error)
        return _preprocess(config, tokenizer, encoding, tokenizer, inputs, on_progress)


def _fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    try:
        return FastEncoder(tokenizer)
    except FastEncoderError as error:
        logger.warning(_FALLBACK, error)
        return None


def _preprocess(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    encoding: Encoding,
    encoder: Encoder,
    inputs: Inputs,
    on_progress: OnProgress,
) -> PreprocessReport:
    started = time.monotonic()
    name = LIBRARY if isinstance(encoder, FastEncoder) else "tokenizer"
    report = PreprocessReport(
        corpora={key: CorpusCounts() for key in config.keys.corpora}, total_input_bytes=inputs.total_bytes, encoder=name
    )
    if encoding.eod_id is not None:
        report.eod = f"{tokenizer.token_table()[encoding.eod_id]!r} ({encoding.eod_id})"
    writer = ShardWriter(
        encoding=encoding,
        encoder=encoder,
        dtype=dtype_for_vocabulary(tokenizer.vocab_size).name,
        folder=config.parts_folder,
        stop_at_invalid=config.on_error == "stop",
        tokenizer=tokenizer if config.keys.score_keys else None,
        identity=hashlib.sha256(repr((tokenizer.definition(), encoding, name)).encode()).hexdigest(),
    )
    lines_before: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        outputs = [_Output(config, key, stack) for key in config.keys.corpora]
        made = stack.enter_context(
            contextlib.closing(make_shards(inputs.chunks(config.workers), writer, config.workers))
        )
        for chunk, shard in made:
            _count(chunk, shard, config, report, lines_before)
            for at, output in enumerate(outputs):
                output.add(shard, at)
            report.seconds = time.monotonic() - started
            on_progress(report)
        _require_tokens(config, report)
        for output in outputs:
            output.finish(tokenizer, encoding, report)
        for output in outputs:  # only after all are complete
            output.put_in_place()
    report.seconds = time.monotonic() - started
    return report


def _eod_id(config: PreprocessConfig, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eod_id if config.eod_token is None else require_token(tokenizer, config.eod_token, "--eod-token")


def _encoding(config: PreprocessConfig, tokenizer: Tokenizer) -> Encoding:
    eod_id = _eod_id(config, tokenizer)
    for flag, is_set, index, name in (
        ("--append-eod", config.append_eod, eod_id, "eos_token"),
        ("--prepend-bos", config.prepend_bos, tokenizer.bos_id, "bos_token"),
    ):
        if is_set and index is None:
            fix = f"set {name} in its tokenizer_config.json, or remove {flag}"
            if flag == "--append-eod":
                fix = f"name one with --eod-token, or {fix}"
            raise ConfigError(flag, True, f"be used with a tokenizer that defines {name}", fix)
    if tokenizer.adds_bos_by_default and not config.prepend_bos:
        logger.warning(
            "transformers and Megatron's preprocessing prepend BOS (token %s) to every text with this tokenizer; "
            "here documents begin with BOS only with --prepend-bos",
            tokenizer.bos_id,
        )
    return Encoding(
        keys=config.keys,
        bos_id=tokenizer.bos_id if config.prepend_bos else None,
        eod_id=eod_id if config.append_eod else None,
        special_tokens=tuple(tokenizer.special_tokens()),
        special_tokens_in_text=config.special_tokens_in_text,
    )


def _count(
    chunk: Chunk, shard: Shard, config: PreprocessConfig, report: PreprocessReport, lines_before: dict[str, int]
) -> None:
    """Add a shard to the report; `lines_before` counts the lines of earlier chunks by source."""
    before = 0 if chunk.begins else lines_before.get(chunk.source, 0)
    lines_before[chunk.source] = before + shard.num_lines
    invalid = [InvalidLineOfFile(chunk.source, before + entry.line + 1, entry.reason) for entry in shard.invalid]
    if invalid and config.on_error == "stop":
        raise CorpusError(
            "--input",
            f"{invalid[0].source}:{invalid[0].line}",
            f"be a valid document ({invalid[0].reason})",
            f"{_advice(invalid[0].reason, config.keys)}, or pass --on-error skip",
        )
    report.num_documents += shard.num_documents
    report.num_invalid += shard.num_invalid
    report.invalid += invalid[: max(0, REPORTED_INVALID_LINES - len(report.invalid))]
    report.num_bytes += shard.num_bytes
    if shard.resumed and shard.name not in report.made:
        report.num_resumed_bytes += shard.num_bytes
    report.made.add(shard.name)
    report.input_bytes += chunk.input_bytes
    for total, counts in zip(report.corpora.values(), shard.corpora, strict=True):
        total.num_tokens += counts.num_tokens
        total.num_trained += counts.num_trained
        total.num_empty += counts.num_empty
        total.longest_document = max(total.longest_document, counts.longest_document)
        total.max_token_id = max(total.max_token_id, counts.max_token_id)
        total.num_special += counts.num_special


def _advice(reason: str, keys: DocumentKeys) -> str:
    """Return what to do about an invalid line."""
    if not reason.startswith(MISSING_KEY):
        return "correct the line"
    flags = "--prompt-key and --response-key" if keys.prompt_key is not None else "--json-keys"
    if keys.loss_mask_key is not None:
        flags += " and --loss-mask-key"
    if keys.score_keys:
        flags += " and --score-key"
    return f"name the keys of these lines with {flags}"


def _require_tokens(config: PreprocessConfig, report: PreprocessReport) -> None:
    """Check the corpora of all keys before the first is put in place."""
    for key, counts in report.corpora.items():
        if counts.num_tokens == 0:
            rule = f"have a text with tokens under {key!r} ({report.num_documents} documents were read)"
            fix = "check the files and the keys"
        elif config.keys.is_masked and counts.num_trained == 0:
            rule, fix = "have a token whose loss mask is 1", "check the loss masks, prompts and responses"
        else:
            continue
        clear(config.parts_folder)  # no later run could use the shards
        raise CorpusError("--input", ", ".join(config.input), rule, fix)


class _Output:
    """The corpus of a key and its loss mask, joined from shards while the workers make more."""

    def __init__(self, config: PreprocessConfig, key: str, stack: contextlib.ExitStack) -> None:
        self._config, self._key = config, key
        prefix = config.corpus_prefix(key)
        self._tokens = stack.enter_context(JoinedCorpus(prefix, config.parts_folder))
        self._mask: JoinedCorpus | None = None
        if config.keys.is_masked:
            self._mask = stack.enter_context(JoinedCorpus(loss_mask_prefix(prefix), config.parts_folder))
        self._columns = [
            stack.enter_context(JoinedCorpus(column_prefix(prefix, name), config.parts_folder))
            for name in config.keys.score_keys
        ]

    def add(self, shard: Shard, at: int) -> None:
        """Append corpus number `at` of a shard."""
        self._tokens.add(CorpusIndex(shard.prefix(self._config.parts_folder, at)))
        if self._mask is not None:
            self._mask.add(CorpusIndex(shard.mask_prefix(self._config.parts_folder, at)))
        for i, column in enumerate(self._columns):
            column.add(CorpusIndex(shard.column_prefix(self._config.parts_folder, i)))

    def finish(self, tokenizer: Tokenizer, encoding: Encoding, report: PreprocessReport) -> None:
        """Complete the corpora, with their sidecar."""
        counts = report.corpora[self._key]
        mask = None if self._mask is None else self._mask.finish()
        for column in self._columns:
            column.finish()

        def sidecar_of(merged: Merged) -> Sidecar:
            return Sidecar(
                tokenizer_fingerprint=tokenizer.fingerprint(),
                vocab_size=tokenizer.vocab_size,
                num_documents=merged.num_documents,
                num_tokens=merged.num_tokens,
                max_token_id=counts.max_token_id,
                eod_id=encoding.eod_id,
                bos_id=encoding.bos_id,
                command=self._config.command,
                bin_sha256=merged.bin_sha256,
                idx_sha256=merged.idx_sha256,
                num_empty=counts.num_empty,
                num_invalid=report.num_invalid,
                longest_document=counts.longest_document,
                special_tokens_in_text=encoding.special_tokens_in_text,
                num_special_in_text=counts.num_special,
                loss_mask=None if mask is None else loss_mask_prefix(self._config.corpus_prefix(self._key)).name,
                loss_mask_bin_sha256=None if mask is None else mask.bin_sha256,
                loss_mask_idx_sha256=None if mask is None else mask.idx_sha256,
            )

        self._tokens.finish(sidecar_of)

    def put_in_place(self) -> None:
        """Put the corpora in place, the tokens last, and then complete the columns."""
        for corpus in (self._mask, *self._columns, self._tokens):
            if corpus is not None:
                corpus.put_in_place()
        for name in self._config.keys.score_keys:
            write_column_sidecar(self._config.corpus_prefix(self._key), name)
