"""A disk that is really full: one error on every rank, and the checkpoint before is whole."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_slm.analysis.probe_records import ProbeFolder
from megatron_slm.checkpoint.format import Manifest, complete_checkpoints, verify_files
from megatron_slm.telemetry.history import History
from megatron_slm.telemetry.metrics import MetricsWriter
from megatron_slm.training import health
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, run_world

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of the given size, in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def error(failed: WorldError) -> str:
    """The one error line of all ranks; there is no traceback but the one that TensorBoard's own thread leaves."""
    for output in failed.outputs:
        assert output.count("Traceback") == output.count("Exception in thread") <= output.count("event_file_writer.py")
    [line] = [line for out in failed.outputs for line in out.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("small_disk", [MIB], indirect=True)
def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """With room for one checkpoint, and not for two."""
    saved = small_disk / "checkpoints"
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=6, save_interval=2, save=saved,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags(values))
    assert failed.value.codes == [1, 1]
    assert "No space left on device" in error(failed.value)
    found = complete_checkpoints(saved)
    assert found
    for folder in found:
        verify_files(folder, Manifest.read(folder))
    assert sorted(path.name for path in saved.glob("*step*")) == [path.name for path in found], "no leftovers"
    reports = run_world(train_and_report, 2, {**values, "load": saved, "save": tmp_path / "elsewhere"})
    assert [report["step"] for report in reports] == [6, 6]


@pytest.mark.parametrize("small_disk", [64 * 2**10], indirect=True)
def test_no_room_for_the_metrics(small_disk: Path, tmp_path: Path) -> None:
    """The step is saved elsewhere, one rank prints the error, and the run can be resumed."""
    saved = tmp_path / "checkpoints"
    values = run_flags(
        write_corpus(tmp_path / "corpus"), small_disk / "run", train_iters=100, save_interval=100, save=saved,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags(values))
    assert failed.value.codes == [1, 1]
    assert re.search("--run-dir is .*No space left on device", error(failed.value))
    [folder] = complete_checkpoints(saved)
    step = Manifest.read(folder).step
    assert 1 < step < 100
    reports = run_world(train_and_report, 2, {**values, "load": saved, "run-dir": tmp_path / "run", "train-iters": 100})
    assert [report["step"] for report in reports] == [100, 100]


def command_on_a_full_disk(argv: list[str], where: str) -> int:
    """When something is written there for the third time (or another), the disk is full."""
    owner, name = {
        "metrics": (History, "append"),
        "TensorBoard": (SummaryWriter, "add_scalar"),
        "TensorBoard at the end": (SummaryWriter, "flush"),
        "texts": (ProbeFolder, "write"),
        "evaluation": (History, "append"),
    }[where]
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == {"TensorBoard at the end": 1, "evaluation": 4}.get(where, 3):
            raise OSError(errno.ENOSPC, "No space left on device", str(where))
        return real(*args, **kwargs)

    setattr(owner, name, full)
    return command(argv)


@pytest.mark.parametrize("where", ["metrics", "TensorBoard", "TensorBoard at the end", "texts"])
def test_what_rank_0_alone_writes(where: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "5 9 13 17 21 25"}) + "\n")
    values = run_flags(
        corpus, tmp_path / "run", train_iters=4, save_interval=4, save=tmp_path / "run" / "checkpoints",
        eval_interval=1, probe_file=tmp_path / "texts.jsonl", pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command_on_a_full_disk, 2, flags(values), where)
    assert failed.value.codes == [1, 1]
    fix = "free disk space or choose another folder, then resume"
    folder = str(tmp_path / "run")
    expected = (
        f"error: --run-dir is {folder!r}: must be writable (No space left on device: {where}). Fix: {fix} (rank 0, "
    )
    assert error(failed.value).startswith(expected)
    [saved] = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert Manifest.read(saved).step == {"metrics": 3, "TensorBoard": 1, "texts": 3}.get(where, 4)


def train_with_a_full_log(values: dict[str, Any]) -> int:
    """Standard error is full; returns the step that the run ends with."""
    full, log = os.open("/dev/full", os.O_WRONLY), os.dup(2)
    os.dup2(full, 2)
    try:
        return int(train_and_report(values)["step"])
    finally:
        os.dup2(log, 2)


def test_a_log_on_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=3)
    assert run_world(train_with_a_full_log, 1, values) == [3]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_that_was_not_written_is_made_up_for(tmp_path: Path) -> None:
    corpus, run = write_corpus(tmp_path / "corpus"), tmp_path / "run"
    values = run_flags(
        corpus, run, train_iters=4, save_interval=4, save=run / "checkpoints", eval_interval=1,
        valid_data_path=[f"held={corpus}"],
    )  # fmt: skip
    with pytest.raises(WorldError):  # the fourth line: step 1, its evaluation, step 2, its evaluation
        run_world(command_on_a_full_disk, 1, flags(values), "evaluation")
    run_world(train_and_report, 1, {**values, "load": run / "checkpoints"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "eval"] == [1, 2, 3, 4]


def spike_on_a_full_disk(argv: list[str]) -> int:
    """Every loss is a spike, and its record has no room."""

    def full(self: MetricsWriter, line: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    MetricsWriter.bad_batch = full  # type: ignore[method-assign]
    health.spike_limit = lambda losses, config: 0.0  # type: ignore[assignment]
    return command(argv)


def test_no_room_for_the_record_of_a_bad_batch(tmp_path: Path) -> None:
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=4, save_interval=4,
        save=tmp_path / "checkpoints", pipeline_model_parallel_size=2, loss_spike_sigmas=1,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(spike_on_a_full_disk, 2, flags(values))
    assert re.search("--run-dir is .*No space left on device", error(failed.value))
    [saved] = complete_checkpoints(tmp_path / "checkpoints")
    assert Manifest.read(saved).step == 1
