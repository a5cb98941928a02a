"""ZeRO-3's data-parallel ranks share the reference's weights: the bits are those of whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cases import some_by_default
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, flags, options of the reference
    "odd number of ranks": (3, {"global_batch_size": 6}, {}),
    "tied, distilled, probed": (
        2,
        {"loss": "kl", "bf16": True, "slm_probe_interval": 2},
        {"tie_word_embeddings": True},
    ),
    "two references, tp2 sp": (
        4,
        {"slm_score": "reference-loss", "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {},
    ),
    "context parallel, documents": (
        4,
        {"context_parallel_size": 2, "reset_attention_mask": True, "reset_position_ids": True},
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", some_by_default(CASES, "tied, distilled, probed", "two references, tp2 sp"))
def test_shared_weights_are_the_whole_ones(name: str, tmp_path: Path) -> None:
    world_size, changes, options = CASES[name]
    corpus = write_corpus(tmp_path / "corpus")
    values = {
        "objective": "slm", "reference_load": save_hf_llama(tmp_path / "reference", seed=2, **options),
        "deepspeed_config": zero_config(3), "train_iters": 2, **changes,
    }  # fmt: skip
    if "slm_score" in changes:
        values["reference_base"] = save_hf_llama(tmp_path / "base", seed=3, hidden_size=32, num_hidden_layers=5)
    outcomes = []
    for run, whole in (("shared", None), ("whole", True)):
        given = run_flags(corpus, tmp_path / run, **values, whole_reference=whole)
        outcomes.append((run_world(train_and_report, world_size, given), recorded(tmp_path / run)))
    (shared, lines), (whole_ones, lines_of_whole) = outcomes
    assert lines == lines_of_whole
    for one, other in zip(shared, whole_ones, strict=True):
        assert one["kept"] == other["kept"]
        assert one["block_calls"] == other["block_calls"]
        assert all(np.array_equal(a, b) for a, b in zip(one["owned"], other["owned"], strict=True))
