"""Numbers that are not finite: counted, said, never trained on; a step of nothing else is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.types import TokenStatistics
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, reported_error, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nonfinite")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    return path


def break_references(rows: list[int]) -> None:
    """Every micro-batch's reference losses are NaN and infinite at these rows."""
    real = FrozenStage.statistics

    def broken(self: FrozenStage, *args: Any, **named: Any) -> TokenStatistics:
        statistics = real(self, *args, **named)
        statistics.loss_N[rows[::2]] = float("nan")
        statistics.loss_N[rows[1::2]] = float("inf")
        return statistics

    FrozenStage.statistics = broken  # type: ignore[method-assign]


def train_with_broken_references(values: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    break_references(rows)
    return train_and_report(values)


def command_with_broken_references(argv: list[str]) -> int:
    break_references(list(range(32)))
    return command(argv)


def say_and_train(values: dict[str, Any], rows: list[int]) -> None:
    train_with_broken_references(values, rows)
    raise SystemExit(3)  # so that the caller sees what was said


def test_some_rows_are_counted_said_and_left_out(folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "corpus", tmp_path / "run", objective="slm", reference_load=folder / "reference", train_iters=2,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as ended:
        run_world(say_and_train, 2, values, [3, 17, 30])
    assert ended.value.codes == [3, 3]
    said = " ".join(ended.value.outputs[0].split())
    for step in (1, 2):
        assert f"warning: step {step}: dropped 12 tokens with a non-finite loss or score" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["nonfinite_tokens"] == 12  # 3 of each of 4 micro-batches
        assert line["valid_tokens"] == 4 * 29
        assert line["kept_tokens"] == 4 * 18  # ceil(0.6 x 29)
        assert line["skipped_steps"] == 0
        unset = [name for name, value in line.items() if value is None and not name.startswith("backward_")]
        assert unset == ["divergence", "skip_reason", "mfu", "mfu_with_reference"]


ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "stages": (2, {"pipeline_model_parallel_size": 2}),
    "bf16": (1, {"bf16": True}),
    "zero 2": (1, {"deepspeed_config": "ds_configs/zero2_bf16.json"}),
    "zero 3": (1, {"deepspeed_config": "ds_configs/zero3_bf16.json"}),
    "zero 3 offloaded": (1, {"deepspeed_config": "ds_configs/zero3_offload.json", "bf16": True}),
    "zero 3 bf16": (1, {"deepspeed_config": "ds_configs/zero3_bf16.json", "bf16": True}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_steps_of_which_nothing_is_finite_are_skipped(name: str, folder: Path, tmp_path: Path) -> None:
    """The gradients would be zeros; applying them would decay weights and end the run in silence."""
    world_size, layout = ENGINES[name]
    values = run_flags(
        folder / "corpus", tmp_path / "run", objective="slm", reference_load=folder / "reference", train_iters=9,
        max_skipped_steps=2, **layout,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command_with_broken_references, world_size, flags(values))
    assert failed.value.codes == [2] * world_size
    assert "2 up to step 2 (2 x nonfinite-score)" in reported_error(failed.value)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "event" not in line]
    assert [line["skipped_steps"] for line in lines] == [1, 2]
    assert {line["loss"] for line in lines} == {line["grad_norm"] for line in lines} == {None}
    assert {line["nonfinite_tokens"] for line in lines} == {128}


def train_through_a_bad_step(values: dict[str, Any]) -> dict[str, Any]:
    """All of the first step's references are broken, none later."""
    real, calls = FrozenStage.statistics, [0]

    def broken(self: FrozenStage, *args: Any, **named: Any) -> TokenStatistics:
        calls[0] += 1
        statistics = real(self, *args, **named)
        return statistics._replace(loss_N=statistics.loss_N * float("nan")) if calls[0] <= 4 else statistics

    FrozenStage.statistics = broken  # type: ignore[method-assign]
    return train_and_report(values)


@pytest.mark.parametrize("name", ["bf16", "zero 2"])
def test_a_skipped_step_changes_no_weight(name: str, folder: Path, tmp_path: Path) -> None:
    """One bad step, and one good one that shows that training goes on."""
    _, layout = ENGINES[name]
    common = {"objective": "slm", "reference_load": folder / "reference", "weight_decay": 0.5, **layout}
    (before,) = run_world(
        train_and_report, 1, run_flags(folder / "corpus", tmp_path / "a", train_iters=1, lr=1e-30, **common)
    )
    (skipped,) = run_world(
        train_through_a_bad_step, 1, run_flags(folder / "corpus", tmp_path / "b", train_iters=1, **common)
    )
    (after,) = run_world(
        train_through_a_bad_step, 1, run_flags(folder / "corpus", tmp_path / "c", train_iters=2, **common)
    )
    for start, same, moved in zip(before["parameters"], skipped["parameters"], after["parameters"], strict=True):
        assert torch.equal(torch.from_numpy(start), torch.from_numpy(same))
        assert not torch.equal(torch.from_numpy(start), torch.from_numpy(moved))
