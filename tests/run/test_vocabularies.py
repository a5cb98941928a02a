"""Vocabularies are compared token by token, between corpus, tokenizer, model and reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_slm.config.load import parse
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.sidecar import Sidecar
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import ConfigError, CorpusError, VocabularyError
from megatron_slm.run.plan import make_plan
from tests.data.corpora import write_sidecar
from tests.support.runs import flags, run_flags, save_hf_llama

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnop"]


def save_tokenizer(folder: Path, tokens: list[str] = TOKENS) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    with IndexedCorpusWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(30):
            writer.add_document(np.arange(3, 19))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer"))
    write_sidecar(
        tmp_path / "corpus",
        Sidecar(tokenizer_fingerprint=tokenizer.fingerprint(), vocab_size=19, num_documents=30, num_tokens=480,
                max_token_id=18, eod_id=2, command="test"),
    )  # fmt: skip
    save_tokenizer(save_hf_llama(tmp_path / "reference", vocab_size=len(TOKENS)))
    return tmp_path


def plan(folder: Path, **changes: object) -> None:
    values = run_flags(folder / "corpus", folder / "run", tokenizer_type=None, vocab_size=None, **{
        "objective": "slm", "reference_load": folder / "reference", "tokenizer_model": folder / "tokenizer", **changes
    })  # fmt: skip
    make_plan(parse(flags(values))[0], 1)


def test_equal_tables_are_accepted(folder: Path) -> None:
    plan(folder)


def test_a_sidecar_left_of_another_corpus_is_refused(folder: Path) -> None:
    with IndexedCorpusWriter(folder / "other", np.uint16) as writer:
        writer.add_document(np.arange(3, 19))
    for suffix in ("bin", "idx"):
        (folder / f"other.{suffix}").replace(folder / f"corpus.{suffix}")
    with pytest.raises(CorpusError, match=r"corpus\.meta\.json: num_documents is 30: must be 1"):
        plan(folder)


def test_a_reference_of_the_same_size_and_another_table_is_refused(folder: Path) -> None:
    swapped = [*TOKENS[:3], TOKENS[4], TOKENS[3], *TOKENS[5:]]
    other = save_hf_llama(folder / "other", vocab_size=len(TOKENS))
    save_tokenizer(other, swapped)
    with pytest.raises(VocabularyError, match=r"--reference-load.*3|3.*--reference-load"):
        plan(folder, reference_load=other)


def test_a_reference_with_fewer_rows_is_refused_where_it_is_distilled(folder: Path) -> None:
    padded = save_hf_llama(folder / "padded", vocab_size=len(TOKENS) + 2)
    save_tokenizer(padded)
    plan(folder, reference_load=padded, loss="kl")
    architecture = dict.fromkeys(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "init_method_std"]
    )
    plan(folder, init_from=padded, **architecture)
    with pytest.raises(VocabularyError, match=rf"vocabulary size is {len(TOKENS)}: must be at least the model's"):
        plan(folder, init_from=padded, loss="kl", **architecture)


def test_a_reference_without_a_tokenizer_is_refused(folder: Path) -> None:
    bare = save_hf_llama(folder / "bare", vocab_size=len(TOKENS))
    with pytest.raises(VocabularyError, match="token by token"):
        plan(folder, reference_load=bare)


def test_a_start_of_another_table_is_refused(folder: Path) -> None:
    start = save_hf_llama(folder / "start", vocab_size=len(TOKENS))
    save_tokenizer(start, [*TOKENS[:-1], "zz"])
    architecture = dict.fromkeys(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "init_method_std"]
    )
    with pytest.raises(VocabularyError, match="--init-from"):
        plan(folder, init_from=start, **architecture)


def test_a_contradicting_architecture_is_refused(folder: Path) -> None:
    start = save_hf_llama(folder / "start", vocab_size=len(TOKENS))
    save_tokenizer(start)
    with pytest.raises(ConfigError, match=r"--num-layers is 4: must .*checkpoint.*3"):
        plan(folder, init_from=start)


def test_a_corpus_of_another_tokenizer_is_refused(folder: Path) -> None:
    save_tokenizer(folder / "other", [*TOKENS[:-1], "zz"])
    save_tokenizer(folder / "reference", [*TOKENS[:-1], "zz"])
    with pytest.raises(VocabularyError, match="tokenizer of corpus"):
        plan(folder, tokenizer_model=folder / "other")


def test_missing_architecture_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--ffn-hidden-size is missing"):
        plan(folder, ffn_hidden_size=None)


def test_held_out_names_are_unique(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"write NAME=PREFIX"):
        plan(folder, valid_data_path=[f"a={folder / 'corpus'}", f"a={folder / 'corpus'}"])
