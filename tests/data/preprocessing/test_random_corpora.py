"""Random text through all of preprocessing, against transformers' ids written by megatron-core's builder."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer
from tests.data.byte_level import byte_level_folder
from tests.data.megatron_oracle import IndexedDataset, IndexedDatasetBuilder
from tests.data.texts import TEXTS

CHARACTERS = "".join(dict.fromkeys("".join(TEXTS)))


def random_document(draw: random.Random) -> str | list[str]:
    """A text, often an empty one, or a list of some."""
    if draw.random() < 0.2:
        return [str(random_document(draw)) for _ in range(draw.randrange(4))]
    kind = draw.random()
    if kind < 0.25:
        return ""
    if kind < 0.6:
        return "".join(draw.choices(CHARACTERS, k=draw.randrange(1, 60)))
    return draw.choice(TEXTS)[: draw.randrange(200)]


@pytest.mark.parametrize(
    ("first_seed", "count"),
    [(0, 100), *(pytest.param(at, 100, marks=pytest.mark.slow) for at in range(100, 1000, 100))],
)
def test_random_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_seed: int, count: int) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them: for speed
    folder = byte_level_folder(tmp_path / "tokenizer")
    ours, theirs = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for seed in range(first_seed, first_seed + count):
        draw = random.Random(seed)
        documents = ["x", *(random_document(draw) for _ in range(draw.randrange(12)))]
        append_eod, fast = draw.random() < 0.5, draw.random() < 0.5
        ends = ["\n", "\r\n", "\n\n"]
        lines = [json.dumps({"text": text}, ensure_ascii=draw.random() < 0.5) for text in documents]
        source = tmp_path / "in.jsonl"
        source.write_bytes("".join(line + draw.choice(ends) for line in lines).encode())
        chunk_bytes = draw.choice((30, 200, 10**6))
        monkeypatch.setattr("megatron_slm.data.preprocessing.inputs._chunk_bytes", lambda *_, size=chunk_bytes: size)
        config = PreprocessConfig(
            input=(str(source),), output_prefix=str(tmp_path / "c"), append_eod=append_eod, fast_tokenizer=fast
        )
        assert preprocess(config, ours).encoder == ("gigatoken" if fast else "tokenizer")

        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
        sequences = []
        for text in documents:
            rows = [
                theirs(part, add_special_tokens=False).input_ids for part in ([text] if isinstance(text, str) else text)
            ]
            rows = [row for row in rows if row]
            if rows and append_eod:
                rows[-1].append(theirs.eos_token_id)
            builder.add_document(
                np.array([token for row in rows for token in row], np.int64), [len(row) for row in rows]
            )
            sequences += rows
        builder.finalize(str(tmp_path / "theirs.idx"))
        for suffix in ("bin", "idx"):
            written = (tmp_path / f"c_text_document.{suffix}").read_bytes()
            assert written == (tmp_path / f"theirs.{suffix}").read_bytes(), f"seed {seed}"
        reader = IndexedDataset(str(tmp_path / "c_text_document"))
        assert [reader[at].tolist() for at in range(len(reader))] == sequences
