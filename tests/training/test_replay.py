"""Recorded batches through a checkpoint again: the losses of the run, each micro-batch's own norm, no weight changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.checkpoint.fragments import fragments
from megatron_slm.cli.replay import main
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.training.replay import Replay, open_weights, read_records
from tests.support.planting import plant, train_planted
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.world import WorldError, run_world

PLANTED = 13
"""In the second step, in its third micro-batch of two samples."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, the second of which was skipped and is the last, so that its weights are in the checkpoint."""
    path = tmp_path_factory.mktemp("replay")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    run_world(train_planted, 2, values(path, save_interval=2, pipeline_model_parallel_size=2), "gradient", [PLANTED])
    return path


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {"objective": "slm", "reference_load": folder / "reference", "train_iters": 2, "lr": 1e-3, "clip_grad": 0}
    return run_flags(folder / "corpus", folder / "run", **{**common, **changes})


def weights(replay: Replay) -> list[np.ndarray]:
    """The fp32 weights that this rank owns, and those it computes with."""
    engine = replay.run.trainer.engine
    owned = [fragment.view("weight").clone().numpy() for fragment in fragments(engine.optimizer)]
    held = [p.detach().clone().float().numpy() for p in engine.module.parameters() if not hasattr(p, "ds_id")]
    return [*owned, *held]


def replayed(given: dict[str, Any], scratch: Path, planted: list[int]) -> dict[str, Any]:
    """What one rank finds, and its weights before and after."""
    if planted:
        plant("loss", planted)
    init_distributed()
    config = parse(flags(given))[0]
    replay = Replay(config, open_weights(config), scratch)
    before = weights(replay)
    (record,) = read_records(f"{config.logging.run_dir}/bad_batches.jsonl:2")
    found = [asdict(part) for part in replay.batch(record)]
    same = [np.array_equal(a, b) for a, b in zip(before, weights(replay), strict=True)]
    return {"found": found, "same": all(same) and len(same) > 3}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {"pipeline_model_parallel_size": 2}),
        (2, {"deepspeed_config": zero_config(3)}),
        pytest.param(4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["pp2 dp2", "zero3 dp2", "pp2 cp2"],
)
def test_at_any_layout_it_is_the_runs_own_losses(
    world_size: int, layout: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    given = values(folder, load=folder / "run" / "checkpoints", save=folder / "run" / "checkpoints", **layout)
    reports = run_world(replayed, world_size, given, tmp_path, [])
    assert all(report["same"] for report in reports)
    assert all(report["found"] == reports[0]["found"] for report in reports)
    found = reports[0]["found"]
    samples = [[sample["sample"] for sample in part["samples"]] for part in found]
    assert samples == [[8, 9], [10, 11], [12, 13], [14, 15]]
    for part in found:
        assert part["skip_reason"] is None, "the run's fault was planted, not in the data"
        assert part["loss_all"] == pytest.approx(part["recorded_loss_all"], rel=1e-5)
        assert part["grad_norm"] > 0
        assert np.mean([s["loss_all"] for s in part["samples"]]) == pytest.approx(part["loss_all"], rel=1e-5)
        assert sum(s["kept_tokens"] for s in part["samples"]) == 20, "ceil(0.6 x 32)"
    if "pipeline_model_parallel_size" in layout:
        (alone,) = run_world(replayed, 1, values(folder, load=folder / "run" / "checkpoints"), tmp_path / "one", [])
        norms = [[part["grad_norm"] for part in report] for report in (found, alone["found"])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), "a micro-batch's norm does not depend on the layout"


def test_what_is_not_finite_is_found(folder: Path, tmp_path: Path) -> None:
    given = values(
        folder, load=folder / "run" / "checkpoints", pipeline_model_parallel_size=2, probe_file=tmp_path / "not-needed"
    )
    reports = run_world(replayed, 2, given, tmp_path, [PLANTED])
    assert all(report["same"] for report in reports)
    for number, part in enumerate(reports[0]["found"]):
        assert (part["skip_reason"], part["nonfinite_gradient_below_stages"]) == (
            ("nonfinite-loss", [0, 1]) if number == 2 else (None, [])
        )
        assert (part["grad_norm"] is None) == (number == 2)
        assert bool(part["nonfinite_losses"]) == (number == 2)
        # attention multiplies the values at a position by 0 where it must not see them, and 0 x NaN is NaN
        assert [s["nonfinite_losses"] for s in part["samples"]] == [16 * (number == 2)] * 2
        if number == 2:
            assert [s["worst_position"] for s in part["samples"]] == [0, 0]


def command_and_output(argv: list[str]) -> str:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(argv) == 0
    return said.getvalue()


def test_the_command_prints_and_writes_it(folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    argv = [
        f"{folder}/run/bad_batches.jsonl", "--config", str(folder / "run" / "config.yaml"), "--worst", "2",
        "--output", str(tmp_path / "found.json"), "--load", str(folder / "run" / "checkpoints"),
        "--pipeline-model-parallel-size", "1",
    ]  # fmt: skip
    (said,) = run_world(command_and_output, 1, argv)
    (step,) = json.loads((tmp_path / "found.json").read_text())
    assert "Step 2 (nonfinite-gradient), samples 8 to 15" in said
    assert said.count("sound") == 4
    worst = max((s for part in step["micro_batches"] for s in part["samples"]), key=lambda s: s["loss_all"])
    assert f"sample {worst['sample']} of corpus: loss {worst['loss_all']:.4g}" in said
    assert said.count("⟦") == 2
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before, "the run's folder is left alone"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("{0}/run/bad_batches.jsonl:3", "must name recorded steps .*bad_batches.jsonl .2."),
        ("{0}/run/bad_batches.jsonl:2-x", "list steps like 17,20-22"),
        ("{0}/run/none.jsonl", "must be a readable bad_batches.jsonl"),
        ("{0}/run/config.yaml", "must be a readable bad_batches.jsonl"),
    ],
)
def test_wrong_records(word: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_records(word.format(folder))


def test_another_runs_configuration(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="samples of step 2"):
        run_world(replayed, 1, values(folder, train_iters=1), tmp_path, [])
