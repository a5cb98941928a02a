"""A disk that is really full: one error on every rank, and the checkpoint before is whole."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.checkpoint.format import Manifest, complete_checkpoints, verify_files
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, run_world

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the run below, and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    saved = small_disk / "checkpoints"
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=6, save_interval=2, save=saved,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags(values))
    assert failed.value.codes == [1, 1]
    errors = [[line for line in out.splitlines() if line.startswith("error: ")] for out in failed.value.outputs]
    assert all(len(lines) == 1 and "No space left on device" in lines[0] for lines in errors), errors
    assert not any("Traceback" in output for output in failed.value.outputs)
    found = complete_checkpoints(saved)
    assert found
    for folder in found:
        verify_files(folder, Manifest.read(folder))
    assert sorted(path.name for path in saved.glob("*step*")) == [path.name for path in found], "no leftovers"
    reports = run_world(train_and_report, 2, {**values, "load": saved, "save": tmp_path / "elsewhere"})
    assert [report["step"] for report in reports] == [6, 6]
