"""Tokenizers trained once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.data.tokenizers.training import train_sentencepiece, write_tokenizer
from tests.data.texts import training_texts


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained tokenizer.model and its Hugging Face form."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_sentencepiece(training_texts(), vocab_size=500), folder)
    return folder


@pytest.fixture(scope="session")
def model_file(tokenizer_folder: Path) -> Path:
    """The SentencePiece model of that folder."""
    return tokenizer_folder / "tokenizer.model"
