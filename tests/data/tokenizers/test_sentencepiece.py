"""SentencePiece tokenizers, and that their Hugging Face form has the same ids."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.texts import TEXTS, training_texts


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SentencePieceTokenizer]:
    """Train a model with SentencePiece's own defaults but for the given options."""

    def call(**options: object) -> SentencePieceTokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_texts()),
            model_writer=model,
            **{"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2, **options},
        )
        path = tmp_path_factory.mktemp("trained") / "any.model"
        path.write_bytes(model.getvalue())
        return SentencePieceTokenizer(path)

    return call


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
MODELS = {
    "as Llama's: a space before the first word": LLAMA,
    "runs of spaces": {**LLAMA, "allow_whitespace_only_pieces": True},
    "SentencePiece's defaults: normalized, spaces joined": {},
    "no bytes: unknown characters": {**LLAMA, "byte_fallback": False, "character_coverage": 0.98},
    "user-defined symbols": {
        **LLAMA,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>", "[INST]"],
    },
    "no bos, padding": {**LLAMA, "bos_id": -1, "pad_id": 3},
}


def test_is_sentencepiece(model_file: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours = SentencePieceTokenizer(model_file)
    assert (ours.vocab_size, ours.bos_id, ours.eod_id) == (500, 1, 2)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS] == [theirs.encode(t) for t in TEXTS]
    assert ours.token_table() == [theirs.id_to_piece(at) for at in range(500)]
    assert 2 not in ours.encode("</s>"), "control tokens in a text are plain characters"


def test_is_handed_to_another_process_by_its_path(model_file: Path) -> None:
    again = pickle.loads(pickle.dumps(SentencePieceTokenizer(model_file)))
    assert again.encode(TEXTS[0]) == SentencePieceTokenizer(model_file).encode(TEXTS[0])


@pytest.mark.parametrize("model", MODELS)
def test_hugging_face_form_gives_the_same_ids(
    train: Callable[..., SentencePieceTokenizer], model: str, tmp_path: Path
) -> None:
    ours = train(**MODELS[model])
    ours.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eod_id)
    assert theirs.convert_ids_to_tokens(list(range(len(theirs)))) == ours.token_table()
    for text in TEXTS:
        if "<unk>" in text:  # spelled-out special tokens: Hugging Face's rule, see save_pretrained
            continue
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, text
        if 0 not in ids:
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), text


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text(alphabet="ab -=.0▁\n", max_size=60),
        st.lists(st.sampled_from(" ".join(TEXTS[:7]).split(" ")), max_size=20).map(" ".join),
    )
)
def test_hugging_face_form_gives_the_same_ids_on_any_text(tokenizer_folder: Path, text: str) -> None:
    ours, theirs = loaded(tokenizer_folder)
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids) == text.replace("▁", " ")


_loaded: dict[Path, tuple] = {}


def loaded(folder: Path) -> tuple:
    """Both forms, loaded once."""
    if folder not in _loaded:
        model = SentencePieceTokenizer(folder / "tokenizer.model")
        _loaded[folder] = model, AutoTokenizer.from_pretrained(str(folder))
    return _loaded[folder]


def test_loads_beside_a_llama_config_too(model_file: Path, tmp_path: Path) -> None:
    """In a model's folder AutoTokenizer looks at config.json as well; it must not take Llama's own class."""
    ours = SentencePieceTokenizer(model_file)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert [theirs(text).input_ids for text in TEXTS[:9]] == ours.encode_batch(TEXTS[:9])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "a model that is not BPE"),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "spaces that do not begin words"),
    ],
)
def test_models_without_an_exact_form(
    train: Callable[..., SentencePieceTokenizer], options: dict[str, object], found: str, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyError, match=f"must have an exact Hugging Face form; it has {found}"):
        train(**options).save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("found", ["unused pieces", "a denormalizer"])
def test_rare_models_without_an_exact_form(model_file: Path, found: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    if found == "unused pieces":
        proto.pieces[400].type = 5
    else:
        proto.denormalizer_spec.precompiled_charsmap = proto.normalizer_spec.precompiled_charsmap or b"x"
    (tmp_path / "rare.model").write_bytes(proto.SerializeToString())
    tokenizer = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    tokenizer._path = "rare.model"
    with pytest.raises(VocabularyError, match=f"it has {found}"):
        tokenizer._require_convertible(proto)


def test_symbols_and_a_space_before_the_first_word_have_no_exact_form(
    train: Callable[..., SentencePieceTokenizer], tmp_path: Path
) -> None:
    """Hugging Face would put the space behind every symbol as well."""
    with pytest.raises(
        VocabularyError, match=r"must have an exact Hugging Face form; 'a <tool> b<tool><tool>' would become"
    ):
        train(**LLAMA, user_defined_symbols=["<tool>"]).save_pretrained(tmp_path / "hf")


def test_a_wrong_conversion_is_noticed(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slm.data.tokenizers import sentencepiece as sentencepiece_tokenizer

    merges = sentencepiece_tokenizer._merges
    monkeypatch.setattr(sentencepiece_tokenizer, "_merges", lambda proto: merges(proto)[::-1])
    with pytest.raises(VocabularyError, match=r"must have an exact Hugging Face form; '.*' would become \["):
        SentencePieceTokenizer(model_file).save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-model is .*must be a SentencePiece .model file"):
        SentencePieceTokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(VocabularyError, match=r"--tokenizer-model is .*must be a SentencePiece model \("):
        SentencePieceTokenizer(tmp_path / "bad.model")
