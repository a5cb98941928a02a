"""Saves checkpoints: every rank writes its own files, then rank 0 a manifest, then renames the folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.checkpoint.format import (
    PROBE,
    Manifest,
    checkpoint_folders,
    complete_checkpoints,
    file_entry,
    folder_name,
    step_of,
    versions,
)
from megatron_slm.checkpoint.fragments import fragments
from megatron_slm.checkpoint.retention import Retention, clear_leftovers, prune, record_evaluation
from megatron_slm.checkpoint.slices import TABLE
from megatron_slm.checkpoint.snapshot import SnapshotMemory, TensorFile, rank_files
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.tensor_file import write_tensor_file
from megatron_slm.config.architecture import Architecture
from megatron_slm.device import local_device
from megatron_slm.errors import CheckpointError, os_errors_as
from megatron_slm.files import check_writable, sync_folder, write_durably
from megatron_slm.parallel.collectives import all_gather_objects
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.parallel.topology import Topology

logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]
"""Entries of a manifest: size and sha256, by file name."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    folder: Path
    num_bytes: int
    blocked_seconds: float
    """Time that this rank spent in the saver instead of training."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the files of one run's checkpoints, without communication."""

    folder: Path
    topology: Topology
    zero_stage: int
    architecture: Architecture
    tokenizer_fingerprint: str | None
    sample_order: str
    """Fingerprint of the order of the training samples."""
    extras: tuple[Path, ...]
    """Folders copied into every checkpoint under their names: the tokenizer, the model's origin."""
    write_config: Callable[[Path], None]
    """Writes the run's configuration to a path; rank 0 calls it."""
    describe_data: Callable[[int], dict[str, Any]]
    """Describes the corpora's read positions after a number of samples, for the manifest; rank 0 calls it."""

    def prepare(self, start: int, damaged: tuple[Path, ...] = ()) -> None:
        """Prepare the folder before the first step: create it, and clear what killed saves and deletions left.

        Renames checkpoints beyond `start` that are damaged or incomplete.

        Args:
            damaged: checkpoints that have a manifest and do not match it.

        Raises:
            CheckpointError: see `check_save_folder`.
        """
        with _write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink()
        check_save_folder(self.folder, start, damaged)
        with _write_errors():
            clear_leftovers(self.folder)
            for path in _beyond(self.folder, start):
                aside = next(p for n in count() if not (p := _renamed(path, n)).exists())
                os.rename(path, aside)
                logger.warning("%s is damaged or incomplete; renamed to %s", path, aside.name)

    def write(self, folder: Path, files: list[TensorFile], state: RunState, rank: int) -> Entries:
        """Write this rank's files, and on rank 0 also the files of the whole run."""
        entries: Entries = {}
        for file in files:
            entries[file.name] = write_tensor_file(folder / file.name, file.tensors, file.metadata)
            if TABLE in file.metadata and not file.name.startswith("optimizer_"):  # whose table is that of the weights
                entries[file.name][TABLE] = json.loads(file.metadata[TABLE])
        if rank == 0:
            entries |= self._write_shared(folder, state)
        return entries

    def _write_shared(self, folder: Path, state: RunState) -> Entries:
        entries: Entries = {}
        if state.probe_kept is not None:
            entries[PROBE] = write_tensor_file(folder / PROBE, {"kept": state.probe_kept}, {})
        self.write_config(folder / "config.yaml")
        written = [folder / "config.yaml"]
        for extra in self.extras:
            copied = folder / extra.name
            shutil.copytree(extra, copied)
            written += sorted(path for path in copied.rglob("*") if path.is_file())
        for path in written:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[str(path.relative_to(folder))] = file_entry(path)
        for path in {path.parent for path in written}:
            sync_folder(path)
        return entries

    def commit(self, temporary: Path, files: Entries, state: RunState, data: dict[str, Any]) -> Path:
        """Write the manifest and rename the folder; on rank 0, once every rank has written its files."""
        sizes = {"pipeline": self.topology.pipeline, "data": self.topology.data, "tensor": self.topology.tensor}
        if self.topology.context > 1:
            sizes["context"] = self.topology.context
        manifest = Manifest(
            state=state,
            architecture=self.architecture,
            layout={**sizes, "zero_stage": self.zero_stage},
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            sample_order=self.sample_order,
            data=data,
            files=dict(sorted(files.items())),
            versions=dict(versions()),
        )
        manifest.write(temporary)
        target = self.folder / folder_name(state.step)
        os.rename(temporary, target)
        sync_folder(self.folder)
        write_durably(self.folder / "latest", target.name.encode())
        return target


class _Task:
    """Work of this rank, done by a thread or where its end is waited for."""

    def __init__(self, work: Callable[[], Entries], *, in_thread: bool) -> None:
        self.result: Entries = {}
        self.error: BaseException | None = None
        self._work = work
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True) if in_thread else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        try:
            with _write_errors():
                self.result = self._work()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        """True once nothing of the work is done by a thread any more, with or without an error."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Entries:
        """Wait for the end; return the work's result or raise its error."""
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class _Saving:
    """A save under way: first every rank writes its files, then rank 0 commits them."""

    state: RunState
    """A copy: training changes its own."""
    data: dict[str, Any]
    """The corpora's read positions, on rank 0."""
    temporary: Path
    writing: _Task
    committing: _Task | None = None
    num_bytes: int = 0
    blocked_seconds: float = 0.0


class Saver:
    """Saves a run's checkpoints. Every rank calls the same methods after the same steps.

    Asynchronous: a save copies the tensors and returns; a thread of each rank writes the copies, and the first `poll`
    after all of them are done starts rank 0's commit. At most one save is under way; a second one waits for it.

    Methods raise `CheckpointError` on every rank if any rank could not write. Earlier checkpoints are unharmed then,
    and the failed one is removed.
    """

    def __init__(self, writer: Writer, *, asynchronous: bool = False, retention: Retention | None = None) -> None:
        self.writer, self.asynchronous = writer, asynchronous
        self.retention = retention or Retention()
        self._memory = SnapshotMemory()
        self._saving: _Saving | None = None
        self._device = local_device()

    def save(self, optimizer: Any, state: RunState, more: Sequence[TensorFile] = ()) -> Saved | None:
        """Save the state after a step. Collective.

        Args:
            more: files of this rank beside the model's and the optimizer's.

        Returns:
            the committed checkpoint: this one, or (asynchronous) the one before if it was still under way.
        """
        finished = self.finish()
        started = time.perf_counter()
        rank = dist.get_rank()
        temporary = self.writer.folder / f".{folder_name(state.step)}.tmp"
        with raise_on_all_ranks(), _write_errors():
            if rank == 0:
                clear_leftovers(self.writer.folder)
                temporary.mkdir(parents=True)
        tensor_rank = self.writer.topology.coordinate(rank).tensor
        with_moments = state.adam_step > 0
        files = [*rank_files(fragments(optimizer), rank, tensor_rank=tensor_rank, with_moments=with_moments), *more]
        if self.asynchronous:
            files = self._memory.copy(files)
        state = deepcopy(state)
        data = self.writer.describe_data(state.consumed_samples) if rank == 0 else {}
        writing = _Task(lambda: self.writer.write(temporary, files, state, rank), in_thread=self.asynchronous)
        self._saving = _Saving(state, data, temporary, writing, blocked_seconds=time.perf_counter() - started)
        return finished if self.asynchronous else self.finish()

    def poll(self) -> Saved | None:
        """Advance the save under way if all ranks are ready for its next phase. Collective.

        Returns:
            the checkpoint if it is committed now.
        """
        saving = self._saving
        if saving is None:
            return None
        started = time.perf_counter()
        task = saving.committing or saving.writing
        done = task.done
        counts = torch.tensor([float(done), float(done and task.error is not None)], device=self._device)
        dist.all_reduce(counts)
        num_done, num_failed = counts.tolist()
        all_done = num_done == dist.get_world_size()
        if all_done and not num_failed and saving.committing is None:
            self._start_commit(saving)
            all_done = False
        saving.blocked_seconds += time.perf_counter() - started
        return self.finish() if all_done or num_failed else None

    def finish(self) -> Saved | None:
        """Wait until the save under way, if any, is committed. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        started = time.perf_counter()
        try:
            if saving.committing is None:
                self._start_commit(saving)
            assert saving.committing is not None, "the commit was started"
            with raise_on_all_ranks():
                saving.committing.wait()
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(saving.temporary, ignore_errors=True)
            raise
        return Saved(
            folder=self.writer.folder / folder_name(saving.state.step),
            num_bytes=saving.num_bytes,
            blocked_seconds=saving.blocked_seconds + time.perf_counter() - started,
        )

    def _start_commit(self, saving: _Saving) -> None:
        entries: Entries = {}
        with raise_on_all_ranks():
            entries = saving.writing.wait()
        files = {name: entry for one in all_gather_objects(entries) for name, entry in one.items()}
        saving.num_bytes = sum(entry["size"] for entry in files.values())

        def commit() -> Entries:
            if dist.get_rank() == 0:
                self.writer.commit(saving.temporary, files, saving.state, saving.data)
                prune(self.writer.folder, self.retention)
            return {}

        saving.committing = _Task(commit, in_thread=self.asynchronous)

    def evaluated(self, step: int, losses: dict[str, float | None]) -> None:
        """Record the held-out losses of a step for --keep-best; on rank 0."""
        try:
            pending = set() if self._saving is None else {self._saving.state.step}
            record_evaluation(self.writer.folder, step, losses, pending=pending)
        except OSError as error:
            logger.warning(
                "cannot record the held-out losses of step %d beside the checkpoints (%s)", step, error.strerror
            )


def check_save_folder(folder: Path, start: int, damaged: tuple[Path, ...] = ()) -> None:
    """Check that a folder can be written, and holds no other run's checkpoints. Changes nothing.

    Args:
        start: step that the run starts from.
        damaged: checkpoints that have a manifest and do not match it.

    Raises:
        CheckpointError: the folder cannot be written, or holds sound checkpoints of steps beyond `start`.
    """
    with _write_errors():
        check_writable(folder)
    beyond = _beyond(folder, start)
    sound = [path.name for path in complete_checkpoints(folder) if path in beyond and path not in damaged]
    if sound:
        raise CheckpointError(
            "--save",
            str(folder),
            f"contain no checkpoint beyond the step that the run starts from ({start}), but has {sound[-1]}",
            "resume from it with --load, choose another folder, or remove it",
        )


def _beyond(folder: Path, start: int) -> list[Path]:
    return [path for path in checkpoint_folders(folder) if (step_of(path) or 0) > start]


def _write_errors() -> AbstractContextManager[None]:
    fix = "free or choose another disk; earlier checkpoints are unharmed"
    return os_errors_as(CheckpointError, "--save", "checkpoint", "be writable", fix)


def _renamed(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.damaged" + (f".{number}" if number else ""))
