"""Asynchronous saves: what a thread writes is the state at the save, and its failures surface."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.checkpoint import save
from megatron_slm.checkpoint.format import Manifest, complete_checkpoints, folder_name
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.save import Saver, Writer
from megatron_slm.checkpoint.snapshot import TensorFile
from megatron_slm.checkpoint.state import RunState
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.topology import Topology
from tests.checkpoint.test_format import ARCH


@pytest.fixture(autouse=True)
def world_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tensor(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What there is to save: one tensor."""
    tensor = torch.zeros(1000)
    files = [TensorFile("weights_00000.safetensors", {"0.weight": tensor}, {"pieces": "[]"})]
    monkeypatch.setattr(save, "rank_files", lambda *args, **kwargs: files)
    return tensor


class Gate:
    """Holds a write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        real = save.write_tensor_file

        def waiting(*args: Any) -> Any:
            self.entered.set()
            assert self.open.wait(20)
            return real(*args)

        monkeypatch.setattr(save, "write_tensor_file", waiting)


def saver(folder: Path, *, asynchronous: bool = True, **retention: Any) -> Saver:
    writer = Writer(
        folder=folder, topology=Topology(pipeline=1, data=1, tensor=1), zero_stage=1, architecture=ARCH,
        tokenizer_fingerprint=None, sample_order="order", extras=(),
        write_config=lambda path: path.write_text("seed: 1\n") and None,
        describe_data=lambda num_samples: {"consumed": num_samples},
    )  # fmt: skip
    return Saver(writer, asynchronous=asynchronous, retention=Retention(**retention))


def after(step: int) -> RunState:
    return RunState(step=step, consumed_samples=8 * step, adam_step=step)


OPTIMIZER = SimpleNamespace()


def test_training_goes_on_while_the_copy_is_written(tmp_path: Path, tensor: torch.Tensor, monkeypatch) -> None:
    folder = tmp_path / "saved"
    saver(folder, asynchronous=False).save(OPTIMIZER, after(1))
    gate, ours = Gate(monkeypatch), saver(folder)
    assert ours.save(OPTIMIZER, after(2)) is None
    assert gate.entered.wait(20)
    tensor.fill_(7.0)  # the next optimizer step
    assert ours.poll() is None
    assert [path.name for path in complete_checkpoints(folder)] == [folder_name(1)]
    gate.open.set()
    saved = None
    while saved is None:
        saved = ours.poll()
    assert saved.folder == folder / folder_name(2)
    one, other = (Manifest.read(folder / folder_name(step)).files for step in (1, 2))
    assert one == other, "the bytes of a synchronous save of the state at the save"
    assert saved.num_bytes == sum(entry["size"] for entry in other.values())
    assert (folder / "latest").read_text() == folder_name(2)
    assert ours.finish() is None


def test_one_save_at_a_time(tmp_path: Path, tensor: torch.Tensor, monkeypatch) -> None:
    folder, gate = tmp_path / "saved", Gate(monkeypatch)
    ours = saver(folder)
    ours.save(OPTIMIZER, after(1))
    threading.Timer(0.3, gate.open.set).start()
    tensor.fill_(1.0)
    first = ours.save(OPTIMIZER, after(2))
    assert first is not None
    assert first.folder.name == folder_name(1)
    assert first.blocked_seconds > 0.1, "the wait counts"
    second = ours.finish()
    assert second is not None
    assert second.folder.name == folder_name(2)
    one, other = (Manifest.read(folder / folder_name(step)).files for step in (1, 2))
    assert one["weights_00000.safetensors"] != other["weights_00000.safetensors"]


def test_a_failure_surfaces_at_the_next_step_and_leaves_what_was(
    tmp_path: Path, tensor: torch.Tensor, monkeypatch
) -> None:
    folder = tmp_path / "saved"
    ours = saver(folder, keep_last=1)
    ours.save(OPTIMIZER, after(1))
    assert ours.finish() is not None

    def failing(path: Path, *args: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(save, "write_tensor_file", failing)
        ours.save(OPTIMIZER, after(2))
        ours._saving.writing._thread.join()
        with pytest.raises(CheckpointError, match=r"No space left on device: .*weights_00000\.safetensors"):
            ours.poll()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", folder_name(1)]
    assert ours.poll() is None
    ours.save(OPTIMIZER, after(3))
    ours.finish()
    assert [path.name for path in complete_checkpoints(folder)] == [folder_name(3)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_deleted_before_the_next_is_committed(
    asynchronous: bool, tmp_path: Path, tensor: torch.Tensor, monkeypatch
) -> None:
    folder, present = tmp_path / "saved", []
    real = Manifest.write

    def looking(manifest: Manifest, where: Path) -> None:
        present.append([path.name for path in complete_checkpoints(folder)])
        real(manifest, where)

    monkeypatch.setattr(Manifest, "write", looking)
    ours = saver(folder, asynchronous=asynchronous, keep_last=1, retain_interval=2)
    for step in (1, 2, 3, 4):
        ours.save(OPTIMIZER, after(step))
    ours.finish()
    assert present == [[], [folder_name(1)], [folder_name(2)], [folder_name(2), folder_name(3)]]
    assert [path.name for path in complete_checkpoints(folder)] == [folder_name(2), folder_name(4)]


def test_the_best_by_a_held_out_set_stays(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = tmp_path / "saved"
    ours = saver(folder, keep_last=1, keep_best="clean")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        ours.save(OPTIMIZER, after(step))
        ours.evaluated(step, {"clean": loss, "noisy": -float(step)})
    ours.finish()
    assert [path.name for path in complete_checkpoints(folder)] == [folder_name(2), folder_name(4)]


def test_checkpoints_in_the_way(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = tmp_path / "saved"
    ours = saver(folder, asynchronous=False)
    for step in (1, 2, 3):
        ours.save(OPTIMIZER, after(step))
    (folder / folder_name(4)).mkdir()
    with pytest.raises(CheckpointError, match="but has step_00000003"):
        ours.writer.prepare(1, (folder / folder_name(2),))
    (folder / f"{folder_name(3)}.damaged").mkdir()
    ours.writer.prepare(1, (folder / folder_name(2), folder / folder_name(3)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest", folder_name(1), f"{folder_name(2)}.damaged", f"{folder_name(3)}.damaged",
        f"{folder_name(3)}.damaged.1", f"{folder_name(4)}.damaged",
    ]  # fmt: skip
