"""Metrics of a run: every name is documented, all outputs have the same numbers, a resume writes nothing twice."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.errors import ConfigError
from megatron_slm.telemetry.metrics import scalars
from megatron_slm.telemetry.monitors import Monitors, board_folder, check_monitors
from tests.support.planting import train_clean, train_planted
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command
from tests.support.world import WorldError, reported_error, run_world

DOCS = Path("docs/metrics.md")
WANDB = """
import json, os, pathlib

def _say(**what):
    with open(os.environ["WANDB_STUB"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(**given):
    if given["project"] == "unreachable":
        raise RuntimeError("no route to host")
    _say(init={k: v for k, v in given.items() if v}, id=os.environ["WANDB_RUN_ID"], resume=os.environ["WANDB_RESUME"])

def log(data, step=None, commit=None):
    _say(step=step, **data)

def finish():
    _say(finished=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("monitors")
    write_corpus(path / "web")
    write_corpus(path / "code", seed=1)
    save_hf_llama(path / "reference")
    (path / "wandb.py").write_text(WANDB)
    return path


def with_wandb(values: dict[str, Any], folder: Path) -> None:
    """A run with a stand-in for wandb that records its calls."""
    sys.path.insert(0, str(folder))
    sys.modules.pop("wandb", None)
    importlib.invalidate_caches()
    os.environ["WANDB_STUB"] = f"{values['run-dir']}.wandb"
    train_planted(values, "gradient", [12])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run that reports all there is to report."""
    monitors = {"csv_monitor": {"enabled": True}, "wandb": {"enabled": True, "project": "slm", "group": "tests"}}
    zero = run_dir.with_suffix(".json")
    zero.write_text(json.dumps({"zero_optimization": {"stage": 1}, **monitors}))
    return run_flags(
        folder / "web", run_dir, objective="slm", reference_load=folder / "reference", train_iters=4,
        pipeline_model_parallel_size=2, slm_probe_interval=2, eval_interval=2, timing_log_level=2,
        loss_spike_sigmas=6, deepspeed_config=zero,
        **{"data_path": ["6", str(folder / "web"), "2", str(folder / "code")],
           "valid_data_path": f"held={folder / 'code'}", **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run of four steps, and again from the second."""
    path = folder / "run"
    run_world(with_wandb, 2, everything(folder, path, save_interval=2), folder)
    again = everything(folder, path, load=path / "checkpoints" / "step_00000002")
    run_world(with_wandb, 2, again, folder)
    return path


def names_written(run_dir: Path) -> set[str]:
    names = set()
    for line in lines(run_dir / "metrics.jsonl"):
        event = line.pop("event", None)
        for name, value in line.items():
            if event is not None:
                names |= {f"{event}.{name}"} - {f"{event}.step"}
                continue
            names.add(name)
            if name == "timers_ms":
                names |= {f"{name}.{timer}" for timer in value}
            elif name == "sources":
                names |= {f"{name}.{inner}" for part in value.values() for inner in part}
    return names


def test_every_name_is_explained_and_every_explained_name_is_written(run_dir: Path) -> None:
    explained = re.findall(r"^\| `([^`]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == names_written(run_dir)


def test_steps_that_the_schedule_is_measured_in_are_timed_too(run_dir: Path) -> None:
    steps = [line for line in lines(run_dir / "metrics.jsonl") if "event" not in line]
    assert len(steps) == 4
    for line in steps:
        assert {"forward-compute", "backward-compute"} <= set(line["timers_ms"])


def by_name(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl says, as the other sinks should have it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run_dir / "metrics.jsonl"):
        for name, value in scalars(line).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def test_tensorboard_and_csv_have_the_same_numbers_once(run_dir: Path) -> None:
    expected = by_name(run_dir)
    assert [step for step, _ in expected["train/loss_all"]] == [1, 2, 3, 4]
    assert "source/code/loss" in expected
    assert "timers/forward-recv/max" in expected
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        shown = board.Scalars(name)
        assert [event.step for event in shown] == [step for step, _ in points], name
        assert [event.value for event in shown] == pytest.approx([value for _, value in points])
        with (run_dir / "csv" / f"{name.replace('/', '_')}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name.rpartition("/")[2]]
        assert [(int(step), float(value)) for step, value in rows] == points


def test_wandb_is_told_the_same_and_a_resumed_run_is_the_same_run(run_dir: Path) -> None:
    calls = lines(Path(f"{run_dir}.wandb"))
    starts = [number for number, line in enumerate(calls) if "init" in line]
    assert [calls[number]["init"] for number in starts] == [{"project": "slm", "group": "tests"}] * 2
    assert len({calls[number]["id"] for number in starts}) == 1
    assert {calls[number]["resume"] for number in starts} == {"allow"}
    assert [number for number, line in enumerate(calls) if "finished" in line] == [starts[1] - 1, len(calls) - 1]
    second = [
        (line["step"], name, x) for line in calls[starts[1] + 1 : -1] for name, x in line.items() if name != "step"
    ]
    expected = [(step, name, x) for name, points in by_name(run_dir).items() for step, x in points if step > 2]
    assert sorted(second) == sorted(expected)


def test_a_run_that_starts_afresh_puts_csv_files_aside(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train_loss.csv").write_text("step,loss\n1,2.0\n")
    run_world(open_and_write, 1, tmp_path, 0)
    assert (tmp_path / "csv.1" / "train_loss.csv").read_text() == "step,loss\n1,2.0\n"
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,3.0"]


def open_and_write(run_dir: Path, resume_step: int) -> None:
    from megatron_slm.parallel.groups import init_distributed

    init_distributed()
    monitors = Monitors({"csv_monitor": {"enabled": True}}, run_dir, resume_step=resume_step)
    monitors.write({"train/loss": 3.0}, 1)
    monitors.close()


def test_where_tensorboard_writes(tmp_path: Path) -> None:
    there = {"enabled": True, "output_path": str(tmp_path / "boards"), "job_name": "slm"}
    assert board_folder({"tensorboard": there}, tmp_path) == tmp_path / "boards" / "slm"
    assert board_folder({"tensorboard": {**there, "enabled": False}}, tmp_path) == tmp_path / "tensorboard"
    assert board_folder({}, tmp_path) == tmp_path / "tensorboard"


def test_the_engine_does_not_see_them() -> None:
    given = {"zero_optimization": {"stage": 1}, "csv_monitor": {"enabled": True}, "comet": {}}
    assert ds_config.monitors(given) == {"csv_monitor": {"enabled": True}, "comet": {}}


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_package_that_is_missing_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(
        ConfigError, match=rf"package {package} is missing: required by section {name} of the DeepSpeed JSON"
    ):
        check_monitors({name: {"enabled": True}})
    check_monitors({name: {"enabled": False}})


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed JSON: csv_monitor.enabled is 'perhaps': must be accepted"):
        check_monitors({"csv_monitor": {"enabled": "perhaps"}})


def command_with_wandb(values: dict[str, Any], folder: Path) -> None:
    sys.path.insert(0, str(folder))
    sys.modules.pop("wandb", None)
    command(flags(values))


def test_what_cannot_be_opened_ends_all_ranks_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "wandb": {"enabled": True, "project": "unreachable"}})
    )
    given = run_flags(folder / "web", tmp_path / "run", deepspeed_config=zero)
    with pytest.raises(WorldError) as failed:
        run_world(command_with_wandb, 2, given, folder)
    assert failed.value.codes == [1, 1]
    error = reported_error(failed.value)
    assert "DeepSpeed JSON: wandb is 'enabled': must start (RuntimeError: no route to host)" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_timers_there_are_none(folder: Path, tmp_path: Path) -> None:
    run_world(train_clean, 1, run_flags(folder / "web", tmp_path / "run", train_iters=1))
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert "timers_ms" not in line
    assert line["memory_host_mib"] > 50
