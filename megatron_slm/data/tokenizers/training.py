"""Training a small SentencePiece tokenizer of Llama's kind, with an exact Hugging Face form."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.data.preprocessing.documents import DocumentKeys, InvalidLineError, parse_line
from megatron_slm.data.preprocessing.inputs import expand_inputs
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.errors import ConfigError, CorpusError, SlmError

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
    """Train a BPE model; the same texts in the same order give the same bytes.

    Llama's settings (bytes for what has no piece, every digit alone, runs of spaces may be pieces; unk 0,
    bos 1, eos 2), except that nothing is changed in the text: no normalisation, and no space is put before
    its first word. So decoding gives every text back, and the Hugging Face form gives the same ids. Line
    breaks are byte tokens; SentencePiece learns from single lines.

    Args:
        texts: documents.
        vocab_size: pieces of the model, the 256 bytes and 3 special ones included.
        character_coverage: share of the characters of the texts that get a piece; the rest become bytes.

    Returns:
        The serialised model (a `.model` file).

    Raises:
        ConfigError: `vocab_size` is too small, or more than the texts have pieces for.
        CorpusError: the texts hold nothing to learn from.
    """
    import sentencepiece

    if vocab_size <= _MIN_VOCABULARY:
        raise ConfigError(
            "vocab_size",
            vocab_size,
            f"must be more than {_MIN_VOCABULARY} (256 bytes and 3 special tokens)",
            "give a larger one",
        )
    lines = _Lines(texts)
    if lines.is_empty():
        raise CorpusError("text to train on", "", "must hold at least one line that is not blank", "check the input")
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
            "vocab_size",
            vocab_size,
            f"must suit the text: SentencePiece says: {str(error).strip()}",
            "choose another size, or give more text",
        ) from error
    return model.getvalue()


def texts_of_files(inputs: Sequence[str | Path], key: str) -> Iterator[str]:
    """The texts under `key` of files of JSON lines (plain, .gz, .zst, patterns), in order.

    Raises:
        CorpusError: a file cannot be read, or a line is not a document.
    """
    keys = DocumentKeys(json_keys=(key,))
    for path in expand_inputs(inputs):
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            try:
                yield from keys.texts(parse_line(line))[0].texts
            except InvalidLineError as error:
                raise CorpusError(
                    "input",
                    f"{path}:{number}",
                    f"every line must be a document: {error}",
                    "mend or remove the line",
                ) from error


def write_tokenizer(model: bytes, output: str | Path) -> Path:
    """Write a trained model: into a folder with its Hugging Face form beside it, or as `<output>.model`.

    Args:
        model: the serialised model.
        output: a folder if there is one of that name or it ends with a slash; else a prefix.

    Returns:
        The model file. It is never seen half written.

    Raises:
        ConfigError: it cannot be written there.
    """
    is_folder = str(output).endswith("/") or Path(output).is_dir()
    target = Path(output) / "tokenizer.model" if is_folder else Path(f"{output}.model")
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(model)
        os.replace(part, target)
    except OSError as error:
        raise ConfigError("output", str(output), f"must be writable: {error}", "give another place") from error
    if is_folder:
        SentencePieceTokenizer(target).save_pretrained(target.parent)
    return target


class _Lines:
    """Lines that are not blank, long ones in pieces: SentencePiece would leave those out in silence.

    SentencePiece turns an error of its input into text; here it is kept, to be raised as what it was.
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
