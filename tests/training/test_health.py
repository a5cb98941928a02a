"""Steps that went wrong on one rank are skipped on all: as if their batch had never been, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_slm.checkpoint.format import Manifest, find_checkpoint
from megatron_slm.config.health import HealthConfig
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import EXIT_UNUSABLE, ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.loss.sums import LossSums
from megatron_slm.training.health import Health, spike_limit, with_loss
from tests.support.cases import some_by_default
from tests.support.planting import Kind, command_planted, train_clean, train_planted
from tests.support.runs import flags, recorded, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.world import WorldError, reported_error, run_world

PLANTED = 13
"""In the second step's samples, 8 to 15."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2}),
    "pp2 tp2 sp bf16": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "bf16": True,
        },
    ),
    "zero2 dp2 bf16": (2, {"deepspeed_config": zero_config(2), "bf16": True}),
    "zero3 dp2": (2, {"deepspeed_config": zero_config(3)}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 bf16 no clipping": (2, {"bf16": True, "clip_grad": 0}),
    "pp2 dp2 no clipping": (4, {"pipeline_model_parallel_size": 2, "clip_grad": 0}),
    "zero2 tp2 no clipping": (
        2,
        {"deepspeed_config": zero_config(2), "tensor_model_parallel_size": 2, "clip_grad": 0},
    ),
    "zero3 tp2 dp2 bf16": (
        4,
        {"deepspeed_config": zero_config(3), "tensor_model_parallel_size": 2, "bf16": True},
    ),
    "pp4 dp2": (8, {"pipeline_model_parallel_size": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("health")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    return path


def values(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "objective": "slm", "reference_load": folder / "reference", "train_iters": 4, "lr_decay_iters": 4,
        "slm_policy": "quantile", "loss_spike_sigmas": 6, "weight_decay": 0.5,
    }  # fmt: skip
    return run_flags(folder / "corpus", run_dir, **{**common, **changes})


def never_saw(folder: Path, run_dir: Path, layout: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """The first step, then the third and the fourth."""
    run_world(train_clean, world_size, values(folder, run_dir, **{**layout, "train_iters": 1, "save_interval": 1}))
    saved = find_checkpoint(run_dir / "checkpoints")
    manifest = Manifest.read(saved)
    data = {**manifest.data, "consumed": {"corpus": 16}}
    moved = replace(manifest, state=replace(manifest.state, step=2, consumed_samples=16), data=data)
    moved.write(saved)
    saved.rename(saved.with_name("step_00000002"))
    again = values(folder, run_dir / "again", load=run_dir / "checkpoints", **layout)
    return run_world(train_clean, world_size, again)


def bad_batches(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "bad_batches.jsonl").read_text().splitlines()]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    else:
        assert one == other


def check_skipped(folder: Path, tmp_path: Path, name: str, kinds: tuple[Kind, ...]) -> None:
    world_size, layout = {**LAYOUTS, **MORE}[name]
    expected = never_saw(folder, tmp_path / "never", layout, world_size)
    stages, tensor = layout.get("pipeline_model_parallel_size", 1), layout.get("tensor_model_parallel_size", 1)
    data = world_size // stages // tensor
    for kind in kinds:
        run_dir = tmp_path / kind
        found = run_world(train_planted, world_size, values(folder, run_dir, **layout), kind, [PLANTED])
        assert [report["adam_step"] for report in found] == [3] * world_size
        assert_same(found, expected)
        lines = recorded(run_dir)
        assert [line["skip_reason"] for line in lines if "event" not in line] == [None, f"nonfinite-{kind}", None, None]
        assert [line["skipped_steps"] for line in lines if "event" not in line] == [0, 1, 1, 1]
        (bad,) = bad_batches(run_dir)
        assert (bad["step"], bad["skipped"], bad["first_sample"], bad["num_samples"]) == (2, True, 8, 8)
        assert bad["reason"] == f"nonfinite-{kind}"
        block = (PLANTED - 8) // 2
        for part in bad["micro_batches"]:
            is_bad = (part["micro_batch"], part["data_parallel_rank"]) == (block // data, block % data)
            assert (PLANTED in part["samples"]) == is_bad
            assert part["sources"] == ["corpus"] * 2
            below = part["nonfinite_gradient_below_stages"]
            if kind == "gradient":
                # planted below the first stage's first layer, where only the optimizer sees it
                assert (below, part["nonfinite_losses"], part["nonfinite_scores"]) == ([], 0, 0)
            else:
                assert below == (list(range(stages)) if is_bad else [])
                assert (part["nonfinite_losses"] > 0) == is_bad
        assert len(bad["micro_batches"]) == 4
        (event,) = [line for line in lines if line.get("event") == "bad-batch"]
        assert (event["step"], event["reason"], event["first_sample"]) == (2, f"nonfinite-{kind}", 8)


@pytest.mark.parametrize("name", some_by_default(LAYOUTS, "pp2 tp2 sp bf16", "zero2 dp2 bf16"))
def test_what_is_planted_in_one_micro_batch_is_skipped_on_all_ranks(name: str, folder: Path, tmp_path: Path) -> None:
    """A gradient that is wrong on one rank alone is the harder case: the losses of all ranks are sound."""
    check_skipped(
        folder, tmp_path, name, ("loss", "gradient") if name in ("pp2 dp2", "zero2 dp2 bf16") else ("gradient",)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MORE, "pp2 tp2 sp bf16", "zero3 dp2"])
def test_and_at_more_layouts(name: str, folder: Path, tmp_path: Path) -> None:
    check_skipped(folder, tmp_path, name, ("loss", "gradient"))


def check_norm(folder: Path, tmp_path: Path, name: str, threshold: float) -> None:
    """Losses are sound, the gradient is too large: the step is skipped on all ranks, with its norm written down."""
    world_size, layout = {**LAYOUTS, **MORE}[name]
    layout = {**layout, "grad_norm_skip_threshold": threshold}
    expected = never_saw(folder, tmp_path / "never", layout, world_size)
    given = values(folder, tmp_path / "run", save_interval=2, **layout)
    found = run_world(train_planted, world_size, given, "spike", [PLANTED])
    assert_same(found, expected)
    lines = recorded(tmp_path / "run")
    steps = [line for line in lines if "event" not in line]
    assert [line["skip_reason"] for line in steps] == [None, "gradient-norm", None, None]
    assert [line["grad_norm"] > threshold for line in steps] == [False, True, False, False]
    (bad,) = bad_batches(tmp_path / "run")
    assert (bad["step"], bad["reason"], bad["skipped"]) == (2, "gradient-norm", True)
    assert bad["grad_norm"] == steps[1]["grad_norm"]
    assert [line["grad_norm"] for line in lines if line.get("event") == "bad-batch"] == [bad["grad_norm"]]
    load = tmp_path / "run" / "checkpoints" / "step_00000002"
    again = values(folder, tmp_path / "run", load=load, **layout)
    assert_same(run_world(train_planted, world_size, again, "spike", [PLANTED]), expected)
    assert recorded(tmp_path / "run") == lines


THRESHOLD = 20.0
"""The norms of sound steps are 2 to 8."""


def test_a_gradient_norm_beyond_the_threshold_is_skipped(folder: Path, tmp_path: Path) -> None:
    given = values(folder, tmp_path, grad_norm_skip_threshold=THRESHOLD, train_iters=3)
    (found,) = run_world(train_planted, 1, given, "spike", [PLANTED])
    assert found["adam_step"] == 2
    steps = [line for line in recorded(tmp_path) if "event" not in line]
    assert [line["skip_reason"] for line in steps] == [None, "gradient-norm", None]
    assert [line["grad_norm"] > THRESHOLD for line in steps] == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MORE])
def test_its_batch_had_never_been_and_a_resumed_run_skips_it_too(name: str, folder: Path, tmp_path: Path) -> None:
    check_norm(folder, tmp_path, name, THRESHOLD)


def spiky(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """12 steps, the spike in the ninth: enough are there to tell from the fifth on."""
    spikes = {"loss_spike_sigmas": 3, "loss_spike_window": 8, "slm_policy": "top-k", "lr": 1e-3}
    return values(folder, run_dir, **{**spikes, "train_iters": 12, "lr_decay_iters": 12, **changes})


SPIKE = 8 * 8 + 3


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"pipeline_model_parallel_size": 2}),
        pytest.param(2, {"deepspeed_config": zero_config(3)}, marks=pytest.mark.slow),
    ],
    ids=["stages", "zero 3"],
)
def test_a_loss_spike_is_told_and_skipped_where_asked(
    world_size: int, layout: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    run_world(train_clean, world_size, spiky(folder, tmp_path / "calm", **layout))
    assert not (tmp_path / "calm" / "bad_batches.jsonl").exists()
    steps: dict[str, list[dict[str, Any]]] = {}
    for name, skips in (("told", None), ("skipped", True)):
        run_dir = tmp_path / name
        given = spiky(folder, run_dir, skip_loss_spikes=skips, **layout)
        (report, *_) = run_world(train_planted, world_size, given, "spike", [SPIKE])
        steps[name] = [line for line in recorded(run_dir) if "event" not in line]
        assert report["adam_step"] == 12 - bool(skips)
        assert len(report["recent"]) == 8
        (bad,) = bad_batches(run_dir)
        assert (bad["step"], bad["reason"], bad["skipped"], bad["first_sample"]) == (9, "loss-spike", bool(skips), 64)
        assert bad["loss_all"] == steps[name][8]["loss_all"] > bad["loss_limit"]
        assert report["recent"][-4] == bad["loss_limit"], "what later steps are compared with"
        worst = max(bad["micro_batches"], key=lambda part: part["loss_all"])
        assert SPIKE in worst["samples"]
    told, skipped = steps["told"], steps["skipped"]
    assert [line["loss"] for line in told[:9]] == [line["loss"] for line in skipped[:9]]
    assert told[8]["grad_norm"] is not None
    assert (skipped[8]["grad_norm"], skipped[8]["skip_reason"]) == (None, "loss-spike")
    assert told[9]["loss"] != skipped[9]["loss"]


def test_a_resumed_run_knows_the_losses_before_and_tells_its_history_once(folder: Path, tmp_path: Path) -> None:
    """The spike comes two steps after the resume: alone the process would know too few steps to tell."""
    layout = {"pipeline_model_parallel_size": 2, "skip_loss_spikes": True}
    straight = run_world(train_planted, 2, spiky(folder, tmp_path / "straight", **layout), "spike", [SPIKE])
    stopped = spiky(folder, tmp_path / "resumed", **layout, save_interval=7)
    run_world(train_planted, 2, stopped, "spike", [SPIKE])  # to the end: what is beyond the checkpoint is done again
    load = tmp_path / "resumed" / "checkpoints" / "step_00000007"
    again = spiky(folder, tmp_path / "resumed", **layout, load=load)
    resumed = run_world(train_planted, 2, again, "spike", [SPIKE])
    assert_same(straight, resumed)
    assert recorded(tmp_path / "straight") == recorded(tmp_path / "resumed")
    assert bad_batches(tmp_path / "straight") == bad_batches(tmp_path / "resumed")


def test_what_a_spike_is() -> None:
    config = HealthConfig(loss_spike_sigmas=2, loss_spike_window=6)
    assert spike_limit([1.0, 3.0], config) is None, "less than half a window"
    assert spike_limit([1.0, 3.0, 2.0], config) == pytest.approx(2 + 2 * (2 / 3) ** 0.5)
    assert spike_limit([1.0, 3.0, 2.0], HealthConfig()) is None
    assert with_loss([1.0], 2.0, HealthConfig()) == []
    assert with_loss([1.0], None, config) == [1.0]
    assert with_loss([1.0, 3.0, 2.0], 3.5, config) == [1.0, 3.0, 2.0, 3.5]
    limit = spike_limit([1.0, 3.0, 2.0], config)
    assert with_loss([1.0, 3.0, 2.0], 99.0, config) == [1.0, 3.0, 2.0, limit]
    assert with_loss([1.0, 3.0, 2.0, 2.0, 2.0, 2.0], 2.5, config) == [3.0, 2.0, 2.0, 2.0, 2.0, 2.5]


def test_a_level_that_has_come_to_stay_is_no_spike_for_ever() -> None:
    config, losses, spikes = HealthConfig(loss_spike_sigmas=6, loss_spike_window=32), [2.0, 2.1] * 16, 0
    for _ in range(40):
        limit = spike_limit(losses, config)
        assert limit is not None
        spikes += limit < 3.0
        losses = with_loss(losses, 3.0, config)
    assert 1 < spikes < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_spike_sigmas": 0}, "--loss-spike-sigmas is 0: must be positive"),
        ({"loss_spike_sigmas": float("nan")}, "--loss-spike-sigmas is nan"),
        ({"loss_spike_window": 3}, "--loss-spike-window is 3: must .*4"),
        ({"grad_norm_skip_threshold": 0.0}, "--grad-norm-skip-threshold is 0.0: must be positive"),
        ({"skip_loss_spikes": True}, "--loss-spike-sigmas is missing: required by --skip-loss-spikes"),
    ],
)
def test_wrong_flags(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HealthConfig(**changes)


def test_a_run_stops_with_a_checkpoint_behind_the_bad_batches(folder: Path, tmp_path: Path) -> None:
    """The third and the fourth step are bad; the run that goes on is the one that never saw them."""
    layout = {"pipeline_model_parallel_size": 2, "train_iters": 6, "lr_decay_iters": 6}
    bad = list(range(16, 32))
    given = values(folder, tmp_path / "run", **layout, save_interval=100, max_skipped_steps=2)
    with pytest.raises(WorldError) as failed:
        run_world(command_planted, 2, given, "loss", bad)
    assert failed.value.codes == [EXIT_UNUSABLE] * 2
    error = reported_error(failed.value)
    assert "2 up to step 4 (2 x nonfinite-loss)" in error
    assert "the checkpoint just saved has the weights before them" in error
    assert f"tools/replay.py {tmp_path}/run/bad_batches.jsonl" in error
    saved = find_checkpoint(tmp_path / "run" / "checkpoints")
    manifest = Manifest.read(saved)
    assert (manifest.step, manifest.state.consumed_samples, manifest.state.adam_step) == (4, 32, 2)
    assert [(line["step"], line["skipped"]) for line in bad_batches(tmp_path / "run")] == [(3, True), (4, True)]

    resumed = run_world(train_planted, 2, {**given, "load": tmp_path / "run" / "checkpoints"}, "loss", bad)
    assert [report["adam_step"] for report in resumed] == [4, 4]
    lines = [line for line in recorded(tmp_path / "run") if "event" not in line]
    assert [line["skip_reason"] for line in lines] == [None, None, "nonfinite-loss", "nonfinite-loss", None, None]
    (straight, *_) = run_world(train_planted, 2, values(folder, tmp_path / "straight", **layout), "loss", bad)
    assert_same(straight, resumed[0])


def test_without_checkpoints_the_error_says_so(folder: Path, tmp_path: Path) -> None:
    given = values(folder, tmp_path / "run", max_skipped_steps=1)
    with pytest.raises(WorldError, match="no checkpoint was saved, since the run saves none"):
        run_world(command_planted, 1, given, "gradient", [3])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_without_a_kept_token_is_none(folder: Path, tmp_path: Path) -> None:
    """Nothing reaches the threshold: applied, a gradient of zeros would decay the weights."""
    never = values(
        folder, tmp_path / "run", train_iters=2, slm_policy="threshold", slm_threshold=1e9, loss_spike_sigmas=None
    )
    (report,) = run_world(train_clean, 1, never)
    (start,) = run_world(train_clean, 1, {**never, "run-dir": tmp_path / "start", "train-iters": 1})
    assert_same(report["parameters"], start["parameters"])
    assert report["adam_step"] == 0
    assert [part["reason"] for part in bad_batches(tmp_path / "run")] == ["nothing-kept"] * 2


def test_masked_batches_are_no_bad_steps_and_never_end_a_run() -> None:
    """Samples whose prompts fill the window follow each other in fine-tuning data."""
    run: Any = SimpleNamespace(
        state=SimpleNamespace(recent_losses=[2.0, 3.0]),
        plan=SimpleNamespace(config=parse(flags(run_flags(Path("corpus"), Path("run"))))[0]),
    )
    health, masked = (
        Health(run),
        StepResult(sums=LossSums(), grad_norm=0.0, skip_reason="no-trained-token", seconds=1.0),
    )
    for _ in range(run.plan.config.training.max_skipped_steps + 1):
        assert health.examine(masked) is None
        assert not health.must_stop
    assert run.state.recent_losses == [2.0, 3.0]
