"""SentencePiece tokenizers, and their conversion to Hugging Face tokenizers with the same ids.

SentencePiece's BPE merges, anywhere in the text, the neighbors whose joined piece scores highest; Hugging Face's merges
the pair that comes first in a list. So the list holds every split of a piece into two pieces, by falling score, and the
text is not split into words first (no pre-tokenizer).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_slm.data.tokenizers.base import PROBES, Tokenizer, characters_before
from megatron_slm.errors import ConfigError, VocabularyError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # SentencePiece.Type


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`.

    Control tokens (`<s>`, `</s>`) in a text are plain characters, as in SentencePiece, unless
    `special_tokens_are_plain` is set to False: then they become the tokens, and the text behind one is encoded anew.

    Args:
        path: the model file.

    Raises:
        ConfigError: the file does not exist.
        VocabularyError: the file is not a SentencePiece model.
    """

    special_tokens_are_plain = True

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        if not Path(path).is_file():
            raise ConfigError(
                "--tokenizer-model", str(path), "be a SentencePiece .model file", "pass the path of the file"
            )
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise VocabularyError(
                "--tokenizer-model",
                str(path),
                f"be a SentencePiece model ({str(error).strip() or type(error).__name__})",
                "check the file, or pass --tokenizer-type HuggingFaceTokenizer",
            ) from error
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,), {"special_tokens_are_plain": self.special_tokens_are_plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    @override
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    @override
    def bos_id(self) -> int | None:
        return _none_if_negative(self._processor.bos_id())

    @property
    @override
    def eod_id(self) -> int | None:
        return _none_if_negative(self._processor.eos_id())

    @override
    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.special_tokens_are_plain:
            return [self._parsed(text) for text in texts]
        # One thread: --workers parallelizes over processes.
        return list(self._processor.encode(list(texts), num_threads=1))

    @override
    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        if not self.special_tokens_are_plain:
            return super().encode_with_ends(text)
        pieces = self._processor.encode(text, return_type="proto").pieces
        return [piece.id for piece in pieces], characters_before(text, [piece.end for piece in pieces])

    def _parsed(self, text: str) -> list[int]:
        special = self.special_tokens()
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]:
            ids += [special[part]] if part in special else self._processor.encode(part)
        return ids

    @override
    def special_tokens(self) -> dict[str, int]:
        return dict(self._control_tokens)

    @cached_property
    def _control_tokens(self) -> dict[str, int]:
        indices = range(self.vocab_size)
        control = {self._processor.id_to_piece(i): i for i in indices if self._processor.is_control(i)}
        return dict(sorted(control.items(), key=lambda item: -len(item[0])))  # the longest match first

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    @override
    def token_table(self) -> list[str]:
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @override
    def definition(self) -> bytes:
        return bytes(self._processor.serialized_model_proto())

    @override
    def fast_definition(self) -> str | None:
        """Return a form without control tokens, which are plain characters; None for models with no exact form."""
        if not self.special_tokens_are_plain:
            return None
        try:
            proto = self._proto()
            self._require_convertible(proto)
            self._check_conversion(_convert(proto), proto)
        except VocabularyError:
            return None
        return str(_convert(proto, with_control=False).to_str())

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face tokenizer with the same ids; like this one it adds no token by default.

        One difference remains: in Hugging Face a control token spelled out in a text becomes that token.

        Raises:
            VocabularyError: the model is not BPE, or has no exact Hugging Face form, as checked on `PROBES`.
        """
        from transformers import PreTrainedTokenizerFast

        fast_class: Any = PreTrainedTokenizerFast
        proto = self._proto()
        self._require_convertible(proto)
        backend = _convert(proto)
        self._check_conversion(backend, proto)
        names = {"unk_token": self._processor.unk_id(), "bos_token": self.bos_id, "eos_token": self.eod_id}
        names["pad_token"] = _none_if_negative(self._processor.pad_id())
        tokenizer = fast_class(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            **{name: self._processor.id_to_piece(at) for name, at in names.items() if at is not None},
        )
        tokenizer.save_pretrained(str(folder))

    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        generated: Any = sentencepiece_model_pb2  # its classes are generated at run time
        proto = generated.ModelProto()
        proto.ParseFromString(self._processor.serialized_model_proto())
        return proto

    def _require_convertible(self, proto: Any) -> None:
        normalizer, found = proto.normalizer_spec, None
        if proto.trainer_spec.model_type != _BPE:
            found = "a model that is not BPE"
        elif any(piece.type == _UNUSED for piece in proto.pieces):
            found = "unused pieces"
        elif proto.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
            found = "spaces that do not begin words"
        elif proto.denormalizer_spec.precompiled_charsmap:
            found = "a denormalizer"
        if found is not None:
            raise VocabularyError(
                "SentencePiece model",
                self._path,
                f"have an exact Hugging Face form; it has {found}",
                "use a BPE model trained by tools/train_tokenizer.py, or a Hugging Face tokenizer",
            )

    def _check_conversion(self, backend: Any, proto: Any) -> None:
        symbols = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == _USER_DEFINED]
        control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
        for text in (*PROBES, *(f"a {symbol} b{symbol}{symbol}" for symbol in symbols)):
            if any(symbol in text for symbol in control):
                continue
            expected = self.encode(text)
            ids = backend.encode(text, add_special_tokens=False).ids
            # One library decodes an unknown character as " ⁇ ", the other as "<unk>".
            same_text = self._processor.unk_id() in ids or backend.decode(
                ids, skip_special_tokens=False
            ) == self.decode(ids)
            if ids != expected or not same_text:
                raise VocabularyError(
                    "SentencePiece model",
                    self._path,
                    f"have an exact Hugging Face form; {text!r} would become {ids} instead of {expected}",
                    "use a BPE model trained by tools/train_tokenizer.py, or a Hugging Face tokenizer",
                )


def _none_if_negative(index: int) -> int | None:
    return index if index >= 0 else None


def _convert(proto: Any, *, with_control: bool = True) -> Any:
    """Return the `tokenizers.Tokenizer` of a SentencePiece BPE model."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in proto.pieces),
        )
    )
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    for piece in proto.pieces:
        if piece.type == _USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
        elif piece.type == _CONTROL and with_control:
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
    return backend


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, the pieces by falling score, ties by id."""
    joinable = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    ranked = sorted((-piece.score, index) for index, piece in enumerate(proto.pieces) if piece.type == _NORMAL)
    merges = []
    for _, index in ranked:
        text = proto.pieces[index].piece
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [(left, right) for left, right in halves if left in joinable and right in joinable]
    return merges
