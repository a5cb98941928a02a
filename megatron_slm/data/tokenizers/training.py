"""Trains a small SentencePiece tokenizer with Llama's settings and an exact Hugging Face form."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus.indexed_writer import temporary_path
from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.data.preprocessing.documents import DocumentKeys, InvalidLineError, parse_line
from megatron_slm.data.preprocessing.inputs import expand_json_lines
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.errors import ConfigError, CorpusError, SlmError, os_errors_as

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_NUM_BYTES = 256
_MAX_LINE_CHARACTERS = 8192
_MIN_VOCABULARY = _NUM_BYTES + 3
_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "max_sentence_length": 4 * _MAX_LINE_CHARACTERS,
    "unk_id": UNK_ID,
    "bos_id": BOS_ID,
    "eos_id": EOS_ID,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, character_coverage: float = 0.9995) -> bytes:
    """Train a BPE model; the same texts in the same order yield the same bytes.

    The settings are Llama's (byte fallback, digits split, pieces of several spaces; unk 0, bos 1, eos 2), except that
    the text is not changed: no normalization, no space before the first word. So decoding restores every text, and the
    Hugging Face form yields the same ids. Line breaks are byte tokens, because SentencePiece trains on single lines.

    Args:
        texts: documents.
        vocab_size: pieces of the model, including 256 bytes and 3 special tokens.
        character_coverage: share of the characters of the texts that get a piece; the rest become bytes.

    Returns:
        The serialized model (a `.model` file).

    Raises:
        ConfigError: `vocab_size` is too small, or too large for the texts.
        CorpusError: the texts hold no line that is not blank.
    """
    import sentencepiece

    if vocab_size <= _MIN_VOCABULARY:
        raise ConfigError(
            "--vocab-size",
            vocab_size,
            f"be above {_MIN_VOCABULARY} (256 bytes and 3 special tokens)",
            "choose a larger one",
        )
    lines = _Lines(texts)
    if lines.is_empty():
        raise CorpusError("text of --input", "", "have at least one line that is not blank", "check the input")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            **_OPTIONS,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise ConfigError(
            "--vocab-size",
            vocab_size,
            f"fit the text (SentencePiece: {str(error).strip()})",
            "choose another size, or add more text",
        ) from error
    return model.getvalue()


def texts_of_files(inputs: Sequence[str | Path], key: str) -> Iterator[str]:
    """Yield the texts under `key` of files of JSON lines (plain, .gz, .zst, patterns), in order.

    Raises:
        CorpusError: a file cannot be read, or a line is invalid.
    """
    keys = DocumentKeys(json_keys=(key,))
    for path in expand_json_lines(inputs):
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            try:
                yield from keys.texts(parse_line(line))[0].texts
            except InvalidLineError as error:
                raise CorpusError(
                    "--input", f"{path}:{number}", f"be a valid document ({error})", "correct or remove the line"
                ) from error


def write_tokenizer(model: bytes, output: str | Path) -> Path:
    """Write a trained model atomically: into a folder with its Hugging Face form, or as `<output>.model`.

    Args:
        model: the serialized model.
        output: a folder if it exists as one or ends with a slash; else a prefix.

    Returns:
        The path of the model file.

    Raises:
        ConfigError: the file cannot be written.
    """
    is_folder = str(output).endswith("/") or Path(output).is_dir()
    target = Path(output) / "tokenizer.model" if is_folder else Path(f"{output}.model")
    temporary = temporary_path(target)
    with os_errors_as(ConfigError, "--output", str(output), "be writable", "choose another path"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(model)
        os.replace(temporary, target)
    if is_folder:
        SentencePieceTokenizer(target).save_pretrained(target.parent)
    return target


class _Lines:
    """Iterates over the lines that are not blank, long ones split: SentencePiece silently skips long lines.

    SentencePiece turns an exception of its input into a message; `error` keeps the exception.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.error: SlmError | None = None
        self._lines = self._cut(texts)
        self._first = next(self._lines, None)

    def is_empty(self) -> bool:
        return self._first is None

    def __iter__(self) -> Iterator[str]:
        if self._first is None:
            return
        yield self._first
        try:
            yield from self._lines
        except SlmError as error:
            self.error = error
            raise

    @staticmethod
    def _cut(texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            for line in text.splitlines():
                if line.strip():
                    for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                        yield line[start : start + _MAX_LINE_CHARACTERS]
