"""When the reference's forward passes run changes nothing but the time a step takes: the same bits in every mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.types import MicroBatch
from tests.faults.test_stopping import train_until_killed
from tests.parity.test_resume import metrics
from tests.support.cases import some_by_default
from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

PLAINEST = "ride-along"
OTHERS = ["skewed", "bubble", "sequential"]
HALF_THE_LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
HALF_THE_WIDTH = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24}
LARGER = {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 72}
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "pp2 tp2 sp": (
        4,
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2 dp2 bf16 recompute": (
        4,
        {"pipeline_model_parallel_size": 2, "bf16": True, "recompute_granularity": "full"},
    ),
}

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    folder = tmp_path_factory.mktemp("schedules")
    corpus = write_corpus(folder / "corpus")
    held_out = write_corpus(folder / "held_out", seed=5, num_documents=7)
    done: dict[str, dict[str, Any]] = {}

    def run(layout: str, mode: str, *, reference: dict[str, Any] = LARGER, **changes: Any) -> dict[str, Any]:
        key = json.dumps([layout, mode, reference, changes], default=str)
        if key not in done:
            world_size, parallel = LAYOUTS[layout]
            run_dir = folder / str(len(done))
            hf = folder / f"reference {json.dumps(reference)}".replace('"', "")
            if not hf.exists():
                save_hf_llama(hf, **reference)
            values = {
                "objective": "slm", "reference_load": hf, "reference_schedule": mode, "eval_interval": 2,
                "valid_data_path": [f"held={held_out}"], **parallel, **changes,
            }  # fmt: skip
            reports = run_world(train_and_report, world_size, run_flags(corpus, run_dir, **values))
            done[key] = {"lines": metrics(run_dir), "reports": reports, "run_dir": run_dir}
        return done[key]

    return run


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["lines"] == other["lines"]
    assert len([line for line in one["lines"] if line.get("event") == "eval"]) == 3
    for a, b in zip(one["reports"], other["reports"], strict=True):
        assert a["kept"] == b["kept"]
        for name in ("parameters", "owned"):
            for x, y in zip(a[name], b[name], strict=True):
                assert np.array_equal(x, y), name
        assert np.array_equal(a["rng"], b["rng"])


@pytest.mark.parametrize("mode", OTHERS)
def test_every_mode_with_two_stages(train: Train, mode: str) -> None:
    assert_same_bits(train("pp2", mode), train("pp2", PLAINEST))


@pytest.mark.parametrize(
    "layout", some_by_default(["pp4", "pp2 tp2 sp", "pp2 dp2 bf16 recompute"], "pp2 tp2 sp", "pp2 dp2 bf16 recompute")
)
def test_the_default_mode_at_every_layout(train: Train, layout: str) -> None:
    skewed = train(layout, "skewed")
    leads = skewed["reports"][0]["schedule"].leads
    assert leads[0] > leads[-1] > 0, "the stages differ in how far the reference is ahead"
    assert_same_bits(skewed, train(layout, PLAINEST))


@pytest.mark.parametrize(
    ("layout", "reference"),
    [
        ("pp4", ONE_LAYER),
        pytest.param("pp2", HALF_THE_LAYERS, marks=pytest.mark.slow),
        pytest.param("pp2", HALF_THE_WIDTH, marks=pytest.mark.slow),
    ],
    ids=["fewer layers than stages", "half the layers", "half the width"],
)
def test_another_size_of_reference(train: Train, layout: str, reference: dict[str, Any]) -> None:
    assert_same_bits(train(layout, "skewed", reference=reference), train(layout, PLAINEST, reference=reference))


def test_a_schedule_that_is_fitted_to_measured_steps(train: Train) -> None:
    measured, counted = train("pp2", "skewed", reference_schedule_warmup_steps=2), train("pp2", "skewed")
    of_ranks = [report["schedule"] for report in measured["reports"]]
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0].costs != counted["reports"][0]["schedule"].costs
    assert_same_bits(measured, train("pp2", PLAINEST))


@pytest.mark.slow
@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize(
    "reference",
    [LARGER, HALF_THE_LAYERS, HALF_THE_WIDTH, ONE_LAYER],
    ids=["larger", "half the layers", "half the width", "one layer"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_layout_and_reference(train: Train, layout: str, reference: dict[str, Any], mode: str) -> None:
    plain = train(layout, PLAINEST, reference=reference)
    assert_same_bits(train(layout, mode, reference=reference), plain)


@pytest.mark.parametrize("layout", ["pp2", pytest.param("pp2 dp2 bf16 recompute", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after"), [pytest.param("skewed", "skewed", marks=pytest.mark.slow), ("bubble", "skewed")]
)
def test_a_resume_in_the_middle(train: Train, before: str, after: str, layout: str, tmp_path: Path) -> None:
    """From a checkpoint written while the reference was ahead: what is stored is what was trained on."""
    stopped = train(layout, before, save=tmp_path / "saved", save_interval=2)
    plain = train(layout, PLAINEST)
    assert stopped["lines"] == plain["lines"]
    resumed = train(layout, after, load=tmp_path / "saved" / "step_00000002")
    steps = [line for line in plain["lines"] if line["step"] > 2]
    assert resumed["lines"] == steps
    for one, other in zip(resumed["reports"], plain["reports"], strict=True):
        assert one["kept"] == other["kept"][-len(one["kept"]) :]
        for x, y in zip(one["parameters"], other["parameters"], strict=True):
            assert np.array_equal(x, y)


def test_a_stop_by_a_signal_leaves_nothing_hanging(tmp_path: Path) -> None:
    """The step that turns out to be the last has worked ahead; what it did is dropped and done again on resume."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference", **LARGER)
    common = {"objective": "slm", "reference_load": reference, "pipeline_model_parallel_size": 2, "lr_decay_iters": 6}
    values = run_flags(corpus, tmp_path / "run", train_iters=6, save_interval=40, **common)
    assert run_world(train_until_killed, 2, values, 4 * 2 + 1) == [3, 3]
    assert find_checkpoint(tmp_path / "run" / "checkpoints").name == "step_00000003"
    run_world(train_and_report, 2, {**values, "load": tmp_path / "run" / "checkpoints"})
    straight = run_flags(corpus, tmp_path / "straight", train_iters=6, reference_schedule=PLAINEST, **common)
    run_world(train_and_report, 2, straight)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def train_and_list_reads(values: dict[str, Any]) -> list[int]:
    read: list[int] = []
    real = MicroBatchSource.micro_batch

    def recording(self: MicroBatchSource, consumed_samples: int, micro_step: int) -> MicroBatch:
        batch = real(self, consumed_samples, micro_step)
        read.extend(batch.sample_b.tolist())
        return batch

    MicroBatchSource.micro_batch = recording  # type: ignore[method-assign]
    train_and_report(values)
    return read


@pytest.mark.parametrize("mode", ["skewed", "ride-along"])
def test_each_sample_is_read_once_and_none_beyond_the_last_step(mode: str, tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference", **LARGER)
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, pipeline_model_parallel_size=2,
        train_iters=3, reference_schedule=mode,
    )  # fmt: skip
    for read in run_world(train_and_list_reads, 2, values):
        assert sorted(read) == list(range(3 * 8))
