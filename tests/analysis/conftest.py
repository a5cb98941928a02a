"""Two tiny Llama folders with one tokenizer, and texts for them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.runs import save_hf_llama

TEXTS = [
    "Question: what is 12 plus 30?\nAnswer: 42\n",
    "\tTabs, two  spaces — naïve café 🙂 <script>alert('x&y')</script>",
    "The quick brown fox jumps over the lazy dog again and again, 1,234 times.\n\n",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[Path]:
    """Four models with different weights, as if from one run."""
    made = []
    for seed in range(4):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        save_hf_llama(folder, seed=seed, vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of two sources; one document says what it is made of."""
    path: Path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    rng = random.Random(0)
    records: list[dict[str, Any]] = [{"text": text, "source": f"site {i % 2}"} for i, text in enumerate(TEXTS)]
    records.append({"text": "abc 12 def", "source": "site 0", "spans": [["words", 4], ["number", 3], ["words", 3]]})
    for _ in range(6):
        records.append({"text": " ".join(rng.choice(TEXTS).split()[:9]) + str(rng.randint(0, 999)), "source": "site 1"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def browser() -> str:
    """A headless browser, where there is one."""
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no browser is installed")
    return found
