"""Training from stored scores is training with the reference itself: the same losses and the very same kept tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cases import some_by_default
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import online_losses, online_then_stored, score_here, stored
from tests.support.training import train_and_report
from tests.support.world import WorldError, run_world

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "pp2 tp2 sp": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 dp2 bf16": (4, {"pipeline_model_parallel_size": 2, "bf16": True}),
    "dp2 zero3": (2, {"deepspeed_config": "ds_configs/zero3_bf16.json"}),
}


@pytest.mark.parametrize("name", some_by_default(LAYOUTS, "pp2 tp2 sp", "dp2 zero3"))
def test_the_same_bits_as_online(name: str, tmp_path: Path) -> None:
    """Scored and trained at the layout of the online run: metrics, kept tokens and weights are equal bit for bit."""
    world_size, layout = LAYOUTS[name]
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    held_out = write_corpus(tmp_path / "held_out", seed=5, num_documents=3)
    common = {"objective": "slm", "train_iters": 4, "slm_keep_ratio": 0.5, "valid_data_path": [held_out], **layout}
    online = run_flags(corpus, tmp_path / "online", **common, reference_load=reference, eod_mask_loss=True)
    scoring = run_flags(corpus, tmp_path / "run", **common, reference_load=reference, output=tmp_path / "scores")
    offline = run_flags(
        corpus, tmp_path / "offline", **common, reference_scores=[tmp_path / "scores"], eod_mask_loss=True
    )
    for live, read in run_world(online_then_stored, world_size, online, scoring, offline):
        assert live["kept"] == read["kept"]
        assert len(live["owned"]) == len(read["owned"]) > 0
        assert all(np.array_equal(a, b) for a, b in zip(live["owned"], read["owned"], strict=True))
        assert read["block_calls"] < live["block_calls"], "no reference was run"
    lines = recorded(tmp_path / "offline")
    assert lines == recorded(tmp_path / "online")
    assert len(lines) == 4 + 1  # and an evaluation, which reads no scores
    assert all(line["kept_tokens"] < line["valid_tokens"] < 8 * 16 for line in lines[:4])  # some masked, some not kept


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["one process", "pp2"])
def test_self_reference_from_stored_entropies(layout: dict[str, Any], tmp_path: Path) -> None:
    """The intersection of low losses and low entropies, bit for bit as with the reference itself."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {
        "objective": "slm", "train_iters": 3, "slm_score": ["reference-loss", "reference-entropy"],
        "slm_combine": "intersection", "slm_combine_ratios": [0.7, 0.7], **layout,
    }  # fmt: skip
    online = run_flags(corpus, tmp_path / "online", **common, reference_load=reference)
    scoring = run_flags(
        corpus, tmp_path / "run", objective="slm", train_iters=3, **layout, reference_load=reference,
        output=tmp_path / "scores", with_entropy=True,
    )  # fmt: skip
    offline = run_flags(corpus, tmp_path / "offline", **common, reference_scores=[tmp_path / "scores"])
    for live, read in run_world(online_then_stored, 2 if layout else 1, online, scoring, offline):
        assert live["kept"] == read["kept"]
        assert all(np.array_equal(a, b) for a, b in zip(live["owned"], read["owned"], strict=True))
    assert recorded(tmp_path / "offline") == recorded(tmp_path / "online")
    assert not torch.equal(stored(tmp_path / "scores", "entropy"), stored(tmp_path / "scores"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a reference, and its losses as one process computes them online."""
    path = tmp_path_factory.mktemp("stored")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    return path


RUN = {"objective": "slm", "train_iters": 4}


def test_stores_of_all_layouts_hold_the_losses_of_one_process(folder: Path) -> None:
    common = {**RUN, "reference_load": folder / "reference"}
    (losses,) = run_world(online_losses, 1, run_flags(folder / "corpus", folder / "online", **common))
    assert sorted(losses) == list(range(32))
    rows = torch.from_numpy(np.stack([losses[i] for i in range(32)]))
    layouts = {
        "111": {},
        "211": {"pipeline_model_parallel_size": 2, "micro_batch_size": 1},
        "222": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "113": {"micro_batch_size": 3},
    }
    for layout, changes in layouts.items():
        size = int(layout[0]) * int(layout[1]) * int(layout[2])
        values = run_flags(folder / "corpus", folder / "run", **{**common, **changes}, output=folder / layout)
        run_world(score_here, size, values)
        torch.testing.assert_close(stored(folder / layout), rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(stored(folder / "111"), rows)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
        (2, {"deepspeed_config": "ds_configs/zero2_bf16.json"}),
        (1, {"micro_batch_size": 4, "global_batch_size": 16, "train_iters": 2}),
    ],
    ids=["pp2 tp2", "zero2 dp2", "other batches"],
)
def test_one_store_serves_every_layout_and_batch_size(size: int, changes: dict[str, Any], folder: Path) -> None:
    corpus, store = folder / "corpus", folder / "scores"
    batches = {name: value for name, value in changes.items() if name in ("global_batch_size", "train_iters")}
    online = {**RUN, **batches, "micro_batch_size": changes.get("micro_batch_size", 2)}
    if not store.exists():
        run_world(
            score_here, 1, run_flags(corpus, folder / "run", **RUN, reference_load=folder / "reference", output=store)
        )
    values = run_flags(corpus, folder / "single", **online, reference_load=folder / "reference")
    (single,) = run_world(train_and_report, 1, values)
    values = run_flags(corpus, folder / "read", **{**RUN, **changes}, reference_scores=[store])
    reports = run_world(train_and_report, size, values)
    assert {tokens: kept for report in reports for tokens, kept in report["kept"]} == dict(single["kept"])
    losses = [[line["loss"] for line in recorded(folder / name)] for name in ("read", "single")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_run_reads_the_same_scores(folder: Path) -> None:
    values = {**RUN, "lr_decay_iters": 4, "pipeline_model_parallel_size": 2}
    store = {"reference_scores": [folder / "two_stages"]}
    scored = run_flags(folder / "corpus", folder / "run", **values, reference_load=folder / "reference")
    run_world(score_here, 2, {**scored, "output": folder / "two_stages"})
    straight = run_world(train_and_report, 2, run_flags(folder / "corpus", folder / "straight", **values, **store))
    stopped = run_flags(folder / "corpus", folder / "resumed", **{**values, **store, "train_iters": 2}, save_interval=2)
    run_world(train_and_report, 2, stopped)
    load = folder / "resumed" / "checkpoints"
    again = run_flags(folder / "corpus", folder / "resumed", **values, **store, load=load)
    resumed = run_world(train_and_report, 2, again)
    assert recorded(folder / "straight") == recorded(folder / "resumed")
    for one, other in zip(straight, resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one["owned"], other["owned"], strict=True))


@pytest.mark.parametrize("name", some_by_default(["one corpus", "blend"], "blend"))
def test_an_extended_run_reads_scores_of_the_very_samples_that_it_goes_on_with(name: str, tmp_path: Path) -> None:
    """What --load says of the order holds for the scores too: losses and kept tokens as with the reference itself."""
    web, books = write_corpus(tmp_path / "web"), write_corpus(tmp_path / "books", seed=1, num_documents=15)
    reference = save_hf_llama(tmp_path / "reference")
    paths = [web] if name == "one corpus" else [0.7, web, 0.3, books]
    common = {"objective": "slm", "data_path": paths, "slm_keep_ratio": 0.5, "lr_decay_iters": 14}
    live = {**common, "reference_load": reference}
    begun = run_flags(web, tmp_path / "begun", **live, train_iters=3, save_interval=3)
    run_world(train_and_report, 1, begun)
    load = {"load": tmp_path / "begun" / "checkpoints", "train_iters": 14}  # 112 samples, beyond the first epoch
    scoring = run_flags(web, tmp_path / "run", **live, **load, output=tmp_path / "scores")
    online = run_flags(web, tmp_path / "online", **live, **load)
    offline = run_flags(web, tmp_path / "offline", **common, **load, reference_scores=[tmp_path / "scores"])
    ((live_report, read),) = run_world(online_then_stored, 1, online, scoring, offline)
    assert live_report["kept"] == read["kept"]
    assert all(np.array_equal(a, b) for a, b in zip(live_report["owned"], read["owned"], strict=True))
    assert recorded(tmp_path / "offline") == recorded(tmp_path / "online")
    assert read["block_calls"] < live_report["block_calls"], "no reference was run"

    fresh = {**{k: v for k, v in scoring.items() if k != "load"}, "output": tmp_path / "fresh"}
    run_world(score_here, 1, fresh)
    with pytest.raises(WorldError) as failed:
        run_world(train_and_report, 1, {**offline, "reference-scores": [tmp_path / "fresh"]})
    assert "must be the run's" in str(failed.value)
    assert "(its --load too, where it was extended)" in str(failed.value)
    other = {**scoring, "seed": 5, "output": tmp_path / "other"}
    with pytest.raises(WorldError, match=r"--load: order of the corpus web"):
        run_world(score_here, 1, other)
