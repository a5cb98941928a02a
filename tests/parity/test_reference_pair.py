"""Two live references: kept are the tokens that the first predicts better than the second, at any layout and schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples
from tests.parity.test_schedules import OTHERS, PLAINEST, assert_same_bits
from tests.support.runs import SEQ_LENGTH, recorded, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

KEEP, STEPS = 0.5, 2
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "zero2 tp2": (2, {"deepspeed_config": "ds_configs/zero2_bf16.json", "tensor_model_parallel_size": 2}),
    "pp2 tp2 sp": (
        4,
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2 dp2 documents": (
        4,
        {"pipeline_model_parallel_size": 2, "reset_attention_mask": True, "reset_position_ids": True},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    write_corpus(path / "corpus")
    write_corpus(path / "held_out", seed=5, num_documents=7)
    save_hf_llama(path / "reference", seed=2)
    save_hf_llama(path / "base", seed=3, hidden_size=32, num_hidden_layers=5)
    return path


def train(folder: Path, run_dir: Path, layout: str, **changes: Any) -> dict[str, Any]:
    world_size, parallel = LAYOUTS[layout]
    values = {
        "objective": "slm", "reference_load": folder / "reference", "reference_base": folder / "base",
        "slm_score": "reference-loss", "slm_keep_ratio": KEEP, "train_iters": STEPS, "eval_interval": 1,
        "valid_data_path": [f"held={folder / 'held_out'}"], **parallel, **changes,
    }  # fmt: skip
    reports = run_world(train_and_report, world_size, run_flags(folder / "corpus", run_dir, **values))
    return {"reports": reports, "lines": recorded(run_dir)}


def token_losses(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp64 [N], by transformers."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def by_hand(folder: Path) -> tuple[dict[bytes, list[int]], list[float]]:
    """Kept rows by a micro-batch's tokens, and the mean difference of each step."""
    opened = IndexedCorpus(folder / "corpus")
    samples = PackedSamples(
        opened, 0, opened.num_sequences, sequence_length=SEQ_LENGTH, num_samples=STEPS * 8, seed=1234
    )
    kept, means = {}, []
    for step in range(STEPS):
        total = 0.0
        for first in range(step * 8, step * 8 + 8, 2):
            tokens = torch.stack([torch.from_numpy(samples[i].tokens) for i in (first, first + 1)])
            difference_N = token_losses(folder / "reference", tokens) - token_losses(folder / "base", tokens)
            count = math.ceil(KEEP * difference_N.numel())
            lowest = torch.argsort(difference_N, stable=True)[:count]
            kept[tokens[:, :-1].numpy().tobytes()] = sorted(lowest.tolist())
            total += float(difference_N.mean()) / 4
        means.append(total)
    return kept, means


@pytest.mark.parametrize(
    "layout", ["pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2 tp2", "pp2 tp2 sp"))]
)
def test_kept_tokens_are_those_of_transformers(folder: Path, tmp_path: Path, layout: str) -> None:
    kept, means = by_hand(folder)
    found = train(folder, tmp_path, layout)
    assert {tokens: rows for report in found["reports"] for tokens, rows in report["kept"]} == kept
    steps = [line for line in found["lines"] if "event" not in line]
    assert [line["reference_loss"] for line in steps] == pytest.approx(means, abs=1e-4)
    assert [line["kept_tokens"] for line in steps] == [4 * math.ceil(KEEP * 2 * SEQ_LENGTH)] * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "pp2 tp2 sp", "pp2 dp2 documents"])
def test_every_schedule_has_the_same_bits(folder: Path, tmp_path: Path, layout: str) -> None:
    plainest, *others = (
        train(folder, tmp_path / mode, layout, reference_schedule=mode, train_iters=5, eval_interval=2)
        for mode in (PLAINEST, *OTHERS)
    )
    for other in others:
        assert_same_bits(plainest, other)
