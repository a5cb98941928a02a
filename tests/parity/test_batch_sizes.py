"""Steps of several sizes: the samples, losses and bits of the same micro-batches in other steps, layouts and lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_resume import assert_bit_equal, metrics
from tests.support.runs import SEQ_LENGTH, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import WorldError, run_world

PP2 = {"pipeline_model_parallel_size": 2}
SCHEDULE = f"0:4 {8 * SEQ_LENGTH}:8 {16 * SEQ_LENGTH}:4"
SIZES = [4, 4, 8, 4, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes")
    write_corpus(path / "corpus")
    write_corpus(path / "held_out", seed=5, num_documents=7)
    save_hf_llama(path / "reference", num_hidden_layers=4)
    return path


def values(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    sizes = {"global_batch_size": None, "step_batch_size_schedule": SCHEDULE, "train_iters": 5, "eval_interval": 5}
    slm = {"objective": "slm", "reference_load": folder / "reference", "lr_decay_iters": 5}
    held_out = {"valid_data_path": [f"held={folder / 'held_out'}"]}
    return run_flags(folder / "corpus", run_dir, **{**sizes, **slm, **held_out, **changes})


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "event" not in line]


def test_samples_and_losses_are_those_of_steps_of_one_size(folder: Path, tmp_path: Path) -> None:
    """With weights that stand still, a step of eight samples has the mean of two steps of four."""
    run_world(train_and_report, 2, values(folder, tmp_path / "sizes", **PP2, lr=0, eval_global_batch_size=2))
    one = {"global_batch_size": 4, "step_batch_size_schedule": None, "train_iters": 6}
    run_world(train_and_report, 1, values(folder, tmp_path / "one", **one, lr=0))
    found, plain = steps_of(tmp_path / "sizes"), steps_of(tmp_path / "one")
    assert [line["samples"] for line in found] == [4, 8, 16, 20, 24]
    merged = [[plain[0]], [plain[1]], plain[2:4], [plain[4]], [plain[5]]]
    for line, parts in zip(found, merged, strict=True):
        for name in ("loss", "loss_all", "reference_loss"):
            assert line[name] == pytest.approx(sum(part[name] for part in parts) / len(parts), rel=1e-5), name
        assert line["kept_tokens"] == sum(part["kept_tokens"] for part in parts)
    evaluations = [
        [x["loss"] for x in metrics(tmp_path / name) if x.get("event") == "eval"] for name in ("sizes", "one")
    ]
    assert evaluations[0][-1] == pytest.approx(evaluations[1][-1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, PP2), (2, {"deepspeed_config": zero_config(2)}), (4, {**PP2, "bf16": True})],
    ids=["pp2", "zero2 dp2", "pp2 dp2 bf16"],
)
def test_schedules_and_resumes_have_the_same_bits(
    world_size: int, layout: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    straight = run_world(train_and_report, world_size, values(folder, tmp_path / "straight", **layout, save_interval=1))
    lines = steps_of(tmp_path / "straight")
    assert [line["samples"] for line in lines] == [4, 8, 16, 20, 24]
    if "pipeline_model_parallel_size" in layout:
        for mode in ("ride-along", "bubble"):
            other = values(folder, tmp_path / mode, **layout, reference_schedule=mode)
            assert_bit_equal(straight, run_world(train_and_report, world_size, other))
            assert steps_of(tmp_path / mode) == lines
    for step in (1, 2, 3):
        load = tmp_path / "straight" / "checkpoints" / f"step_{step:08d}"
        resumed = values(folder, tmp_path / f"from {step}", **layout, load=load)
        assert_bit_equal(straight, run_world(train_and_report, world_size, resumed))
        assert steps_of(tmp_path / f"from {step}") == lines[step:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_batch_size_schedule": "0:4 96:3"}, "--step-batch-size-schedule is 3: must be a multiple of"),
        ({"eval_global_batch_size": 5}, "--eval-global-batch-size is 5: must be a multiple of"),
    ],
)
def test_sizes_that_do_not_divide(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldError) as failed:
        run_world(train_and_report, 1, values(folder, tmp_path, **changes))
    assert message in failed.value.outputs[0]
