"""One division by the kept tokens of the whole batch: the gradient does not depend on how the batch was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from tests.support.runs import VOCAB_SIZE, run_flags, save_hf_llama
from tests.support.training import train_and_report
from tests.support.world import run_world


def write_uneven_corpus(prefix: Path) -> Path:
    """Half of it long documents, half almost nothing but ends of documents, whose labels are masked."""
    generator = np.random.default_rng(0)
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        for i in range(24):
            if i % 2:
                writer.add_document(np.append(generator.integers(0, VOCAB_SIZE - 1, 40), VOCAB_SIZE - 1))
            else:
                pairs = generator.integers(0, VOCAB_SIZE - 1, 40)
                pairs[1::6] = VOCAB_SIZE - 1
                pairs[2::6] = VOCAB_SIZE - 1
                pairs[3::6] = VOCAB_SIZE - 1
                pairs[4::6] = VOCAB_SIZE - 1
                writer.add_document(pairs)
    return prefix


def test_cut_into_other_micro_batches(tmp_path: Path) -> None:
    corpus, reference = write_uneven_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")

    def losses(name: str, world_size: int, **changes: Any) -> tuple[list[list[float]], list[Any]]:
        values = run_flags(
            corpus, tmp_path / name, objective="slm", reference_load=reference, slm_scope="sequence",
            eod_mask_loss=True, clip_grad=0.0, **{"train_iters": 3, **changes},
        )  # fmt: skip
        reports = run_world(train_and_report, world_size, values)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [[line["loss"], line["grad_norm"], line["kept_tokens"]] for line in lines], reports

    whole, reports = losses("whole", 1, micro_batch_size=8)
    single, _ = losses("single", 1, micro_batch_size=1)
    over_ranks, _ = losses("ranks", 4, micro_batch_size=2, pipeline_model_parallel_size=2)
    assert single == [pytest.approx(line, rel=1e-5) for line in whole]
    assert over_ranks == [pytest.approx(line, rel=1e-5) for line in whole]
    # Adam's first moment after one step is a tenth of the gradient itself
    gradients = [
        losses(f"one step of {size}", 1, micro_batch_size=size, train_iters=1)[1][0]["owned"][1::3]
        for size in (8, 2, 1)
    ]
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    counts = [len(kept) for _, kept in reports[0]["kept"]]
    assert len(set(counts)) > 1
    tokens = [np.frombuffer(t, dtype=np.int64).reshape(8, -1) for t, _ in reports[0]["kept"]]
    per_sample = [(t != VOCAB_SIZE - 1).sum(1) for t in tokens]
    assert min(p.min() for p in per_sample) * 2 < max(p.max() for p in per_sample), "samples are uneven"
