"""From text to corpora: one `.bin/.idx` a key, under Megatron's names."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_slm.data.corpus.indexed import CorpusIndex, dtype_for_vocabulary
from megatron_slm.data.corpus.joined_corpus import JoinedCorpus
from megatron_slm.data.corpus.sidecar import Sidecar, loss_mask_prefix
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.encoding import Encoder, Encoding
from megatron_slm.data.preprocessing.fast_encoder import LIBRARY, FastEncoder, FastEncoderError
from megatron_slm.data.preprocessing.inputs import Inputs, Piece
from megatron_slm.data.preprocessing.parts_folder import clear, parts_folder
from megatron_slm.data.preprocessing.shards import REPORTED_INVALID_LINES, CorpusCounts, Shard, ShardWriter, make_shards
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)

_FALLBACK = "NOT using the fast tokenizer: %s. Everything is encoded with the tokenizer."


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What `tools/preprocess_data.py` is asked for; the names are its flags'."""

    input: tuple[str, ...]
    """Files (JSON lines, plain, .gz or .zst; .parquet) or patterns, read in this order; `-` is standard input."""
    output_prefix: str
    """The corpora are `{output_prefix}_{key}_document.bin` and `.idx`."""
    keys: DocumentKeys = field(default_factory=DocumentKeys)
    """Which keys hold what."""
    append_eod: bool = False
    """End every document that has a token with the end-of-document token."""
    prepend_bos: bool = False
    """Begin every document that has a token with the beginning-of-text token."""
    workers: int = 1
    """Processes that tokenize; the corpora do not depend on it."""
    fast_tokenizer: bool = False
    """Encode with a faster library, compared with the tokenizer on samples."""
    on_error: str = "stop"
    """`stop` at the first line that is not a document, or `skip` such lines."""
    command: str = ""
    """The command line, for the sidecar."""

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ConfigError("on_error", self.on_error, "must be stop or skip", "choose one of them")
        if self.workers < 1:
            raise ConfigError("workers", self.workers, "must be at least 1", "give --workers 1 or more")

    def corpus_prefix(self, key: str) -> str:
        """Prefix of one key's corpus."""
        return f"{self.output_prefix}_{key}_document"

    @property
    def parts_folder(self) -> Path:
        """Where finished parts wait for the others; gone when the corpora are there."""
        return Path(f"{self.output_prefix}.parts")


class InvalidLineOfFile(NamedTuple):
    """A line that is not a document."""

    source: str
    """The file."""
    line: int
    """Its number, from 1; of a table, its row."""
    reason: str
    """What is wrong with it."""


@dataclass
class PreprocessReport:
    """What was read and written so far; complete when `preprocess` returns it."""

    corpora: dict[str, CorpusCounts] = field(default_factory=dict)
    """By key."""
    num_documents: int = 0
    """Lines that are documents, those without a token included."""
    num_invalid: int = 0
    """Lines that were skipped."""
    invalid: list[InvalidLineOfFile] = field(default_factory=list)
    """The first of them."""
    num_bytes: int = 0
    """Size of the lines read, decompressed."""
    num_resumed_bytes: int = 0
    """As much of it was done by an earlier run."""
    input_bytes: int = 0
    """How much of the input's size on disk is done."""
    total_input_bytes: int | None = None
    """Size of the input on disk; None where it is not known."""
    seconds: float = 0.0
    """Time spent."""
    made: set[str] = field(default_factory=set)
    """Names of the shards, of which equal pieces share one."""
    encoder: str = "tokenizer"
    """What made the ids: the tokenizer, or the faster library."""

    @property
    def bytes_per_second(self) -> float:
        """Of this run."""
        return (self.num_bytes - self.num_resumed_bytes) / max(self.seconds, 1e-9)


OnProgress = Callable[[PreprocessReport], None]


def preprocess(
    config: PreprocessConfig, tokenizer: Tokenizer, on_progress: OnProgress = lambda _: None
) -> PreprocessReport:
    """Tokenize the input and write the corpora, each with its sidecar.

    Nothing is left at the output prefixes if this raises, but for corpora that were there before. Parts that are done
    stay in `config.parts_folder`: the same call goes on from there, and none of another call's are taken.

    Args:
        config: what to do.
        tokenizer: what with.
        on_progress: called after every piece of the input.

    Raises:
        ConfigError: a token is missing, a worker was killed, or another process writes to this prefix.
        CorpusError: the input cannot be read, has an invalid line (with `on_error` stop), or no token.
    """
    inputs = Inputs(config.input)
    for path, times in Counter(path.resolve() for path in inputs.files).items():
        if times > 1:
            logger.warning("%s is named %d times, so that its documents are taken as often", path, times)
    encoding = _encoding(config, tokenizer)
    with parts_folder(config.parts_folder):
        encoder = _fast_encoder(tokenizer) if config.fast_tokenizer else None
        if encoder is not None:
            try:
                return _preprocess(config, tokenizer, encoding, encoder, inputs, on_progress)
            except FastEncoderError as error:
                if not inputs.files:  # some of it is read, and cannot be read again
                    raise ConfigError(
                        "fast_tokenizer", LIBRARY, f"must equal the tokenizer: {error}", "leave --fast-tokenizer out"
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
    writer = ShardWriter(
        encoding=encoding,
        encoder=encoder,
        dtype=dtype_for_vocabulary(tokenizer.vocab_size).name,
        folder=config.parts_folder,
        stop_at_invalid=config.on_error == "stop",
        identity=hashlib.sha256(repr((tokenizer.definition(), encoding, name)).encode()).hexdigest(),
    )
    lines_before: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        outputs = [_Output(config, key, stack) for key in config.keys.corpora]
        made = stack.enter_context(
            contextlib.closing(make_shards(inputs.pieces(config.workers), writer, config.workers))
        )
        for piece, shard in made:
            _take(piece, shard, config, report, lines_before)
            for at, output in enumerate(outputs):
                output.add(shard, at)
            report.seconds = time.monotonic() - started
            on_progress(report)
        _require_tokens(config, report)
        for output in outputs:
            output.finish(tokenizer, encoding, report)
        for output in outputs:  # none before all are whole
            output.put_in_place()
    report.seconds = time.monotonic() - started
    return report


def _encoding(config: PreprocessConfig, tokenizer: Tokenizer) -> Encoding:
    for flag, asked, index, name in (
        ("append_eod", config.append_eod, tokenizer.eod_id, "eos_token"),
        ("prepend_bos", config.prepend_bos, tokenizer.bos_id, "bos_token"),
    ):
        if asked and index is None:
            raise ConfigError(
                flag,
                True,
                "needs a tokenizer that says which token it is",
                f"set {name} in its tokenizer_config.json, or leave --{flag.replace('_', '-')} out",
            )
    if tokenizer.adds_bos_by_default and not config.prepend_bos:
        logger.warning(
            "this tokenizer puts token %s (BOS) before every text in transformers and in Megatron's preprocessing; "
            "here documents begin with it only with --prepend-bos, which is not given",
            tokenizer.bos_id,
        )
    return Encoding(
        keys=config.keys,
        bos_id=tokenizer.bos_id if config.prepend_bos else None,
        eod_id=tokenizer.eod_id if config.append_eod else None,
    )


def _take(
    piece: Piece, shard: Shard, config: PreprocessConfig, report: PreprocessReport, lines_before: dict[str, int]
) -> None:
    """Count a shard into the report; its lines are numbered on from those of the pieces before."""
    before = 0 if piece.begins else lines_before.get(piece.source, 0)
    lines_before[piece.source] = before + shard.num_lines
    invalid = [InvalidLineOfFile(piece.source, before + entry.line + 1, entry.reason) for entry in shard.invalid]
    if invalid and config.on_error == "stop":
        raise CorpusError(
            "input",
            f"{invalid[0].source}:{invalid[0].line}",
            f"every line must be a document: {invalid[0].reason}",
            "mend the line, or leave such lines out with --on-error skip",
        )
    report.num_documents += shard.num_documents
    report.num_invalid += shard.num_invalid
    report.invalid += invalid[: max(0, REPORTED_INVALID_LINES - len(report.invalid))]
    report.num_bytes += shard.num_bytes
    report.num_resumed_bytes += shard.num_bytes if shard.resumed and shard.name not in report.made else 0
    report.made.add(shard.name)
    report.input_bytes += piece.input_bytes
    for total, counts in zip(report.corpora.values(), shard.corpora, strict=True):
        total.num_tokens += counts.num_tokens
        total.num_trained += counts.num_trained
        total.num_empty += counts.num_empty
        total.longest_document = max(total.longest_document, counts.longest_document)
        total.max_token_id = max(total.max_token_id, counts.max_token_id)


def _require_tokens(config: PreprocessConfig, report: PreprocessReport) -> None:
    """All corpora or none: checked for every key before the first is put in place."""
    for key, counts in report.corpora.items():
        problem, fix = "", "check the files and the keys"
        if counts.num_tokens == 0:
            problem = f"must hold a text with tokens under {key!r} ({report.num_documents} documents were read)"
        elif config.keys.is_masked and counts.num_trained == 0:
            problem, fix = "must hold a token that is trained on: the loss mask lets none through", "check the mask"
        if problem:
            clear(config.parts_folder)  # no later run could use them
            raise CorpusError("input", ", ".join(config.input), problem, fix)


class _Output:
    """The corpus of a key and its loss mask, joined from parts while the workers make more."""

    def __init__(self, config: PreprocessConfig, key: str, stack: contextlib.ExitStack) -> None:
        self._config, self._key = config, key
        prefix = config.corpus_prefix(key)
        self._tokens = stack.enter_context(JoinedCorpus(prefix, config.parts_folder))
        self._mask: JoinedCorpus | None = None
        if config.keys.is_masked:
            self._mask = stack.enter_context(JoinedCorpus(loss_mask_prefix(prefix), config.parts_folder))

    def add(self, shard: Shard, at: int) -> None:
        """Corpus number `at` of the shard."""
        self._tokens.add(CorpusIndex(shard.prefix(self._config.parts_folder, at)))
        if self._mask is not None:
            self._mask.add(CorpusIndex(shard.mask_prefix(self._config.parts_folder, at)))

    def finish(self, tokenizer: Tokenizer, encoding: Encoding, report: PreprocessReport) -> None:
        """Make them whole."""
        counts = report.corpora[self._key]
        mask = None if self._mask is None else self._mask.finish()
        sidecar_of = partial(
            Sidecar,
            tokenizer_fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
            max_token_id=counts.max_token_id,
            eod_id=encoding.eod_id,
            bos_id=encoding.bos_id,
            command=self._config.command,
            num_empty=counts.num_empty,
            num_invalid=report.num_invalid,
            longest_document=counts.longest_document,
            loss_mask=None if mask is None else loss_mask_prefix(self._config.corpus_prefix(self._key)).name,
            loss_mask_bin_sha256=None if mask is None else mask.bin_sha256,
            loss_mask_idx_sha256=None if mask is None else mask.idx_sha256,
        )
        self._tokens.finish(lambda merged: sidecar_of(**merged._asdict()))

    def put_in_place(self) -> None:
        """The loss mask first."""
        for corpus in (self._mask, self._tokens):
            if corpus is not None:
                corpus.put_in_place()
