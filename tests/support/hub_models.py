"""Tiny transformers folders with a tokenizer, and a text to train on, for the Python interface."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = "the sum of two and three is five . ten less four six apples pears cost coins each so pay".split()


def write_text(path: Path, *, seed: int = 0, words: int = 3000) -> Path:
    """Write a text of a few words over and over, in a random order."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


def save_tokenizer(folder: Path) -> int:
    """Save a word-level tokenizer with a pad token; return its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return len(table)


def save_model_and_tokenizer(folder: Path, *, seed: int = 0) -> Path:
    """Save a random Llama with a word-level tokenizer."""
    from tests.support.runs import save_hf_llama

    vocab_size = save_tokenizer(folder)
    return save_hf_llama(folder, seed=seed, vocab_size=vocab_size, max_position_embeddings=256, eos_token_id=2)
