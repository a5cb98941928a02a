"""Saving: every rank writes its own pieces, then comes a manifest, then one rename."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from megatron_slm.checkpoint.retention import Retention, clear_leftovers, prune, record_evaluation
from megatron_slm.checkpoint.snapshot import SnapshotMemory, TensorFile, rank_files
from megatron_slm.checkpoint.state import Progress
from megatron_slm.checkpoint.tensor_file import write_tensor_file
from megatron_slm.config.architecture import Architecture
from megatron_slm.device import local_device
from megatron_slm.errors import CheckpointError, os_errors_as
from megatron_slm.files import sync_folder, write_durably
from megatron_slm.parallel.collectives import all_gather_objects, raise_on_all_ranks
from megatron_slm.parallel.topology import Topology

logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]
"""Lines of a manifest: size and sha256, by file name."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    folder: Path
    num_bytes: int
    blocked_seconds: float
    """How long training stood still for it on this rank."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the files of one run's checkpoints; it communicates with nobody."""

    folder: Path
    topology: Topology
    zero_stage: int
    architecture: Architecture
    tokenizer_fingerprint: str | None
    sample_order: str
    """Fingerprint of the order in which the run reads its corpus."""
    extras: tuple[Path, ...]
    """Folders that are copied into every checkpoint (the tokenizer, the model's origin), under their names."""
    write_config: Callable[[Path], None]
    """Writes the run's configuration to a path; rank 0 calls it."""

    def check(self, start: int, damaged: tuple[Path, ...] = ()) -> None:
        """Make sure, before the first step, that this run can write here and will not mix with another one's.

        What killed saves and deletions left is cleared; checkpoints beyond `start` that are damaged or not complete
        are put aside under another name.

        Args:
            damaged: complete by name, but found not to be what their manifests say.

        Raises:
            CheckpointError: the folder cannot be written, or holds checkpoints of steps beyond `start`.
        """
        with _write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink()
        beyond = [path for path in checkpoint_folders(self.folder) if (step_of(path) or 0) > start]
        sound = [p.name for p in complete_checkpoints(self.folder) if p in beyond and p not in damaged]
        if sound:
            raise CheckpointError(
                "--save",
                str(self.folder),
                f"holds no checkpoint beyond the step the run starts from ({start}), but {sound[-1]} is there",
                "resume from it with --load, choose another folder, or remove it",
            )
        with _write_errors():
            clear_leftovers(self.folder)
            for path in beyond:
                aside = next(p for n in count() if not (p := _aside(path, n)).exists())
                os.rename(path, aside)
                logger.warning("%s is not whole and in the way of this run's; it is now %s", path, aside.name)

    def write(self, folder: Path, files: list[TensorFile], progress: Progress, rank: int) -> Entries:
        """Write this rank's files, and on rank 0 those that all ranks share."""
        entries = {file.name: write_tensor_file(folder / file.name, file.tensors, file.metadata) for file in files}
        if rank == 0:
            entries |= self._write_shared(folder, progress)
        return entries

    def _write_shared(self, folder: Path, progress: Progress) -> Entries:
        entries: Entries = {}
        if progress.probe_kept is not None:
            entries[PROBE] = write_tensor_file(folder / PROBE, {"kept": progress.probe_kept}, {})
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

    def commit(self, temporary: Path, files: Entries, progress: Progress) -> Path:
        """Write the manifest and give the folder its name; on rank 0, when every rank has written its files."""
        sizes = {"pipeline": self.topology.pipeline, "data": self.topology.data, "tensor": self.topology.tensor}
        manifest = Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            adam_step=progress.adam_step,
            score_threshold=progress.score_threshold,
            tokens_seen=progress.tokens_seen,
            tokens_kept=progress.tokens_kept,
            recent_losses=progress.recent_losses,
            architecture=self.architecture,
            layout={**sizes, "zero_stage": self.zero_stage},
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            sample_order=self.sample_order,
            data=progress.data,
            files=dict(sorted(files.items())),
            versions=dict(versions()),
        )
        manifest.write(temporary)
        target = self.folder / folder_name(progress.step)
        os.rename(temporary, target)
        sync_folder(self.folder)
        write_durably(self.folder / "latest", target.name.encode())
        return target


class _Job:
    """Work of this rank, done at once or by a thread."""

    def __init__(self, work: Callable[[], Entries], *, in_thread: bool) -> None:
        self.result: Entries = {}
        self.error: BaseException | None = None
        self._work = work
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True) if in_thread else None
        if self._thread is not None:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            with _write_errors():
                self.result = self._work()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Entries:
        """Wait until it has ended; what it returned, or raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class _Saving:
    """A save on its way: first every rank writes its files, then rank 0 commits them all."""

    progress: Progress
    temporary: Path
    writing: _Job
    committing: _Job | None = None
    num_bytes: int = 0
    blocked_seconds: float = 0.0


class Saver:
    """Saves a run's checkpoints. Every rank calls the same methods after the same steps.

    Asynchronous: a save copies what it will write and returns; a thread of each rank writes the copies, and the
    first `poll` after all of them are done has rank 0's thread commit. At most one save is on its way; a second one
    waits for it.

    Methods raise `CheckpointError`, on every rank, if any rank could not write; earlier checkpoints are then as
    they were, and nothing is left of the failed one.
    """

    def __init__(self, writer: Writer, *, asynchronous: bool = False, retention: Retention | None = None) -> None:
        self.writer, self.asynchronous = writer, asynchronous
        self.retention = retention or Retention()
        self._memory = SnapshotMemory()
        self._saving: _Saving | None = None
        self._device = local_device()

    def save(self, optimizer: Any, progress: Progress) -> Saved | None:
        """Save the state after a step. Collective.

        Returns:
            what was committed: this checkpoint, or (asynchronous) the one before where it was still on its way.
        """
        finished = self.finish()
        started = time.perf_counter()
        rank = dist.get_rank()
        temporary = self.writer.folder / f".{folder_name(progress.step)}.tmp"
        with raise_on_all_ranks(), _write_errors():
            if rank == 0:
                clear_leftovers(self.writer.folder)
                temporary.mkdir(parents=True)
        tensor_rank = self.writer.topology.coordinate(rank).tensor
        files = rank_files(optimizer, rank, tensor_rank=tensor_rank, with_moments=progress.adam_step > 0)
        if self.asynchronous:
            files = self._memory.copy(files)
        writing = _Job(lambda: self.writer.write(temporary, files, progress, rank), in_thread=self.asynchronous)
        self._saving = _Saving(progress, temporary, writing, blocked_seconds=time.perf_counter() - started)
        return finished if self.asynchronous else self.finish()

    def poll(self) -> Saved | None:
        """Take the save that is on its way further, where all ranks are ready for it. Collective.

        Returns:
            what was committed since.
        """
        saving = self._saving
        if saving is None:
            return None
        started = time.perf_counter()
        job = saving.committing or saving.writing
        done = job.done
        counts = torch.tensor([float(done), float(done and job.error is not None)], device=self._device)
        dist.all_reduce(counts)
        num_done, num_failed = counts.tolist()
        all_done = num_done == dist.get_world_size()
        if all_done and not num_failed and saving.committing is None:
            self._start_commit(saving)
            all_done = False
        saving.blocked_seconds += time.perf_counter() - started
        return self.finish() if all_done or num_failed else None

    def finish(self) -> Saved | None:
        """Wait for the save that is on its way, if there is one, until it is committed. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        started = time.perf_counter()
        try:
            if saving.committing is None:
                self._start_commit(saving)
            assert saving.committing is not None, "it was started"
            with raise_on_all_ranks():
                saving.committing.wait()
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(saving.temporary, ignore_errors=True)
            raise
        return Saved(
            folder=self.writer.folder / folder_name(saving.progress.step),
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
            self.writer.commit(saving.temporary, files, saving.progress)
            prune(self.writer.folder, self.retention)
            return {}

        is_ours = dist.get_rank() == 0
        saving.committing = _Job(commit if is_ours else dict, in_thread=is_ours and self.asynchronous)

    def evaluated(self, step: int, losses: dict[str, float | None]) -> None:
        """Note the held-out losses of a step, for the choice of the best; on rank 0."""
        try:
            pending = set() if self._saving is None else {self._saving.progress.step}
            record_evaluation(self.writer.folder, step, losses, pending=pending)
        except OSError as error:
            logger.warning("the losses of step %d cannot be noted beside the checkpoints (%s)", step, error.strerror)


def _write_errors() -> AbstractContextManager[None]:
    fix = "free or choose another disk; earlier checkpoints are unharmed"
    return os_errors_as(CheckpointError, "--save", "checkpoint", "can be written", fix)


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.damaged" + (f".{number}" if number else ""))
