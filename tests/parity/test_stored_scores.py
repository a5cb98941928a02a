"""Training from stored scores is training with the reference itself: the same losses and the very same kept tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.scoring import metrics, online_losses, score_here, stored
from tests.support.training import train_and_report
from tests.support.world import run_world

ONLINE: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 tp2 sp": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2 zero3": (2, {"deepspeed_config": "ds_configs/zero3.json"}),
    "pp2 bf16": (2, {"pipeline_model_parallel_size": 2, "bf16": True}),
}
SLM = {"objective": "slm", "train_iters": 4, "eod_mask_loss": True}


def merged(reports: list[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    return {number: row for report in reports for number, row in report.items()}


@pytest.mark.parametrize("name", ONLINE)
def test_the_same_bits_as_online(name: str, tmp_path: Path) -> None:
    """Scored and trained at the layout of the online run: the metrics and weights are equal bit for bit."""
    world_size, layout = ONLINE[name]
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {**SLM, **layout, "slm_keep_ratio": 0.5, "reference_load": reference}
    online = run_world(train_and_report, world_size, run_flags(corpus, tmp_path / "online", **common))
    scoring_layout = {k: v for k, v in layout.items() if k != "deepspeed_config"}
    run_world(
        score_here, world_size,
        run_flags(corpus, tmp_path / "run", **{**common, **scoring_layout}, output=tmp_path / "scores"),
    )  # fmt: skip
    common |= {"reference_load": None, "reference_scores": [tmp_path / "scores"]}
    offline = run_world(train_and_report, world_size, run_flags(corpus, tmp_path / "offline", **common))
    assert metrics(tmp_path / "offline") == metrics(tmp_path / "online")
    for one, other in zip(online, offline, strict=True):
        assert one["kept"] == other["kept"]
        for a, b in zip(one["owned"], other["owned"], strict=True):
            assert np.array_equal(a, b)
        assert other["block_calls"] < one["block_calls"], "no reference was run"
    assert any(0 < len(kept) < len(tokens) for tokens, kept in offline[-1]["kept"])


def test_stores_and_runs_of_all_layouts_and_batches(tmp_path: Path) -> None:
    """One store per layout, each with the losses of one process; trained from at other layouts and batch sizes."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {"objective": "slm", "train_iters": 4, "reference_load": reference}
    expected = merged(run_world(online_losses, 1, run_flags(corpus, tmp_path / "online", **common)))
    single = run_world(train_and_report, 1, run_flags(corpus, tmp_path / "online2", **common))
    assert sorted(expected) == list(range(32))
    rows = torch.from_numpy(np.stack([expected[i] for i in range(32)]))
    layouts = {
        "111": {},
        "211": {"pipeline_model_parallel_size": 2, "micro_batch_size": 1},
        "222": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "113": {"micro_batch_size": 3},
    }
    for layout, changes in layouts.items():
        size = int(layout[0]) * int(layout[1]) * int(layout[2])
        values = run_flags(corpus, tmp_path / "run", **{**common, **changes}, output=tmp_path / layout)
        run_world(score_here, size, values)
        torch.testing.assert_close(stored(tmp_path / layout), rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(stored(tmp_path / "111"), rows)

    for store, size, changes in (
        ("222", 1, {}),
        ("113", 4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
        ("211", 2, {"deepspeed_config": "ds_configs/zero2.json"}),
    ):
        values = {**common, "reference_load": None, "reference_scores": [tmp_path / store], **changes}
        reports = run_world(train_and_report, size, run_flags(corpus, tmp_path / f"run{store}", **values))
        kept = {tokens: rows for report in reports for tokens, rows in report["kept"]}
        assert kept == dict(single[0]["kept"])
        losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in (f"run{store}", "online2")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    other_batches = {"micro_batch_size": 4, "global_batch_size": 16, "train_iters": 2}
    lines = []
    for name, source in (
        ("a", {"reference_load": None, "reference_scores": [tmp_path / "111"]}),
        ("b", {}),
    ):
        reports = run_world(
            train_and_report, 1, run_flags(corpus, tmp_path / name, **{**common, **other_batches, **source})
        )
        lines.append([metrics(tmp_path / name), reports[0]["kept"]])
    assert lines[0][1] == lines[1][1]


def test_resuming_from_stored_scores_is_bit_exact(tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {"objective": "slm", "train_iters": 4, "lr_decay_iters": 4, "pipeline_model_parallel_size": 2}
    scored = run_flags(corpus, tmp_path / "run", **common, reference_load=reference, output=tmp_path / "scores")
    run_world(score_here, 2, scored)
    common["reference_scores"] = [tmp_path / "scores"]
    straight = run_world(train_and_report, 2, run_flags(corpus, tmp_path / "straight", **common))
    stopped = run_flags(corpus, tmp_path / "resumed", **{**common, "train_iters": 2}, save_interval=2)
    run_world(train_and_report, 2, stopped)
    again = run_flags(corpus, tmp_path / "resumed", **common, load=tmp_path / "resumed" / "checkpoints")
    resumed = run_world(train_and_report, 2, again)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")
    for one, other in zip(straight, resumed, strict=True):
        for a, b in zip(one["owned"], other["owned"], strict=True):
            assert np.array_equal(a, b)
