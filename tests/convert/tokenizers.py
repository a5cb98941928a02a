"""A tokenizer of words `w0`, `w1` and so on, as transformers saves it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, words: list[str] | None = None) -> Path:
    """Save one into a folder, by default with 97 words."""
    words = [f"w{i}" for i in range(97)] if words is None else words
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[2], unk_token=words[0]).save_pretrained(folder)
    return folder
