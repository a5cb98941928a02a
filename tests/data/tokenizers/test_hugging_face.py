"""Hugging Face tokenizers: pickling, GPT-2's files, BOS that transformers adds by default."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from megatron_slm.data.tokenizers.registry import Gpt2BpeTokenizer, HuggingFaceTokenizer, build_tokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.byte_level import END, byte_level_folder, gpt2_files
from tests.data.texts import TEXTS


def test_gpt2_files_have_transformers_ids(tmp_path: Path) -> None:
    vocab_file, merge_file = gpt2_files(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(str(tmp_path))
    ours = build_tokenizer("GPT2BPETokenizer", None, vocab_file=vocab_file, merge_file=merge_file)
    of_folder = build_tokenizer("GPT2BPETokenizer", tmp_path)
    assert (ours.vocab_size, ours.eod_id) == (len(theirs), theirs.eos_token_id)
    for text in [*TEXTS, f"a{END}b"]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == of_folder.encode(text) == ids
        assert ours.decode(ids) == text
    ours.save_pretrained(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "hf"))(TEXTS[0]).input_ids == ours.encode(TEXTS[0])
    assert isinstance(pickle.loads(pickle.dumps(ours)), Gpt2BpeTokenizer)


def test_files_that_are_not_gpt2s(tmp_path: Path) -> None:
    vocab_file, merge_file = gpt2_files(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"--tokenizer-model is missing: required by --tokenizer-type GPT2BPETokenizer\..*--vocab-file and --merge-file",
    ):
        build_tokenizer("GPT2BPETokenizer", None)
    with pytest.raises(ConfigError, match=r"--merge-file is .*must be a file"):
        Gpt2BpeTokenizer(vocab_file, tmp_path / "missing")
    with pytest.raises(VocabularyError, match=r"must be GPT-2's vocab.json and merges.txt"):
        Gpt2BpeTokenizer(merge_file, vocab_file)
    vocab_file.write_text(json.dumps({key: at for key, at in json.loads(vocab_file.read_text()).items() if key != END}))
    with pytest.raises(VocabularyError, match="must have the token"):
        Gpt2BpeTokenizer(vocab_file, merge_file)


def test_a_pickled_one_encodes_without_transformers(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_folder)
    (tmp_path / "t").write_bytes(pickle.dumps(tokenizer))
    program = (
        "import pickle, sys\n"
        "tokenizer = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(tokenizer.encode_ragged(['a naive word']).ids.tolist(), tokenizer.eod_id, tokenizer.vocab_size)\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "print(tokenizer.decode([5, 6]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = f"{tokenizer.encode('a naive word')} 2 500\n{tokenizer.decode([5, 6])}\n"
    assert done.stdout == expected


def test_bos_that_transformers_adds_by_default(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert not HuggingFaceTokenizer(tokenizer_folder).adds_bos_by_default
    folder = byte_level_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    end = content["added_tokens"][0]["id"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.adds_bos_by_default
    assert end not in tokenizer.encode("text")
