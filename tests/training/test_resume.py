"""Which checkpoint `--load` means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.run.resume import open_resume
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.training import command
from tests.support.world import WorldError, run_world


def config(folder: Path, **changes: Any) -> Any:
    return parse(flags(run_flags(folder / "corpus", folder / "run", **changes)))[0]


def test_one_command_starts_and_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = tmp_path / "run" / "checkpoints"
    for present in ("nothing", "an empty folder", "a save that was killed"):
        assert open_resume(config(tmp_path, load=saved, save_interval=2)) is None, present
        assert "starting a new run" in caplog.text
        caplog.clear()
        saved.mkdir(parents=True) if not saved.exists() else (saved / ".step_00000002.tmp").mkdir(exist_ok=True)
    assert open_resume(config(tmp_path, load=tmp_path / "run/../run/checkpoints", save=saved)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"save_interval": 2, "exit_on_missing_checkpoint": True},
        {"save": "elsewhere"},
        {},  # the run saves nothing
    ],
)
def test_a_checkpoint_that_should_be_there_and_is_not(changes: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "run" / "checkpoints"
    saved.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="contain a complete checkpoint"):
        open_resume(config(tmp_path, load=saved, **changes))


def test_a_run_that_is_over_is_no_error_where_it_resumes_by_itself(tmp_path: Path) -> None:
    """A job that is queued again and again ends well once there is nothing left to do."""
    write_corpus(tmp_path / "corpus")
    values = run_flags(tmp_path / "corpus", tmp_path / "run", train_iters=2, save_interval=1,
                       load=tmp_path / "run" / "checkpoints", eval_interval=1,
                       valid_data_path=f"held={tmp_path / 'corpus'}")  # fmt: skip
    for expected in ("saved", "the run is complete"):
        output = run_world_output(flags(values))
        assert expected in output
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in history.splitlines()]
    assert [(line["step"], line.get("event")) for line in lines] == [(1, None), (1, "eval"), (2, None), (2, "eval")]

    # a kill between the last checkpoint and its evaluation: the evaluation is made up for
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[:-1]))
    run_world_output(flags(values))
    assert [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == lines

    elsewhere = {**values, "run-dir": tmp_path / "other"}
    with pytest.raises(WorldError, match="be greater than the checkpoint's step, 2"):
        run_world(command, 1, flags(elsewhere))


def run_world_output(argv: list[str]) -> str:
    (output,) = run_world(command_and_output, 1, argv)
    return output


def command_and_output(argv: list[str]) -> str:
    import os
    import sys
    import tempfile

    from megatron_slm.cli.pretrain import main

    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        assert main(argv) == 0
        sys.stderr.flush()
        file.seek(0)
        return file.read().decode()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"save_retain_interval": 4}, "--keep-last is missing: required by --save-retain-interval"),
        ({"keep_best": "held"}, "--keep-last is missing: required by --keep-best"),
        ({"keep_last": 0}, "--keep-last is 0: must be positive"),
        (
            {"keep_last": 2, "keep_best": "held", "save_interval": 4},
            "--keep-best is 'held': must have an evaluation at every checkpoint",
        ),
        (
            {"keep_last": 2, "keep_best": "held", "save_interval": 4, "eval_interval": 3},
            r"multiple of --eval-interval \(3\)",
        ),
        ({"load_fallback": True}, "--load is missing: required by --load-fallback"),
        ({"exit_on_missing_checkpoint": True}, "--load is missing: required by --exit-on-missing-checkpoint"),
        ({"load_checksums": "some"}, "--load-checksums"),
    ],
)
def test_flags_that_cannot_be_meant(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=pattern):
        config(tmp_path, **changes)


def test_the_best_by_a_set_that_is_not_evaluated(tmp_path: Path) -> None:
    from megatron_slm.run.plan import make_plan

    write_corpus(tmp_path / "corpus")
    given = config(tmp_path, keep_last=2, keep_best="clean", save_interval=2, eval_interval=2,
                   valid_data_path=f"held={tmp_path / 'corpus'}")  # fmt: skip
    with pytest.raises(ConfigError, match=r"--keep-best is 'clean': must be the name of a held-out set \(held\)"):
        make_plan(given, 1)
