"""The tokenizer training tool as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from megatron_slm.data.tokenizers.registry import build_tokenizer

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


def test_trains_a_tokenizer_that_both_libraries_load(tmp_path: Path) -> None:
    texts = [f"Sentence number {at} of a small text, with words that repeat." for at in range(100)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    options = ("--input", tmp_path / "in.jsonl", "--json-key", "body", "--vocab-size", 320)
    done = run(*options, "--output", f"{tmp_path}/tokenizer/")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "training on all documents read" in done.stderr
    assert done.stdout == f"wrote {tmp_path}/tokenizer/tokenizer.model\n"
    again = run(*options, "--output", tmp_path / "again")
    model = tmp_path / "tokenizer" / "tokenizer.model"
    assert (again.returncode, (tmp_path / "again.model").read_bytes()) == (0, model.read_bytes())
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert tokenizer.vocab_size == len(theirs) == 320
    assert [theirs(text).input_ids for text in texts] == tokenizer.encode_batch(texts)


def test_one_line_for_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "little"}')
    options = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "t")
    done = run(*options, "--vocab-size", 9000)
    *progress, error = done.stderr.splitlines()
    assert (done.returncode, len(progress)) == (1, 1)
    assert error.startswith("error: --vocab-size is 9000: must fit the text")
    done = run(*options, "--vocabsize", 9000)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "did you mean --vocab-size?" in done.stderr
