"""Writing a checkpoint: every rank its own pieces, then a manifest, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.checkpoint.format import (
    PROBE,
    Manifest,
    complete_checkpoints,
    file_entry,
    folder_name,
    sync_folder,
    versions,
    write_durably,
)
from megatron_slm.checkpoint.fragments import Fragment, fragments
from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.config.architecture import Architecture
from megatron_slm.device import device_rng_state
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.collectives import together
from megatron_slm.parallel.shards import Part, parts_with_offsets
from megatron_slm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    consumed_samples: int
    adam_step: int
    score_threshold: float | None = None
    probe_kept: Tensor | None = None
    """Which tokens the last probe kept, bool [samples, s]; the same on every rank."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the run stands in each of its corpora (`BlendedSamples.state`)."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the checkpoints of one run."""

    folder: Path
    topology: Topology
    architecture: Architecture
    tokenizer_fingerprint: str | None
    sample_order: str
    """Fingerprint of the order in which the run reads its corpus."""
    extras: Path | None
    """A folder whose content goes into every checkpoint (the tokenizer), under the folder's name."""
    write_config: Callable[[Path], None]
    """Writes the run's configuration to a path; rank 0 calls it."""

    def save(self, optimizer: Any, progress: Progress) -> Path:
        """Write one checkpoint. Collective: every rank calls it after the same step.

        Returns:
            the committed folder.

        Raises:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints stay as they are.
        """
        rank = dist.get_rank()
        temporary = self.folder / f".{folder_name(progress.step)}.tmp"
        with together(), _write_errors():
            if rank == 0:
                self._clear_leftovers()
                temporary.mkdir(parents=True)
        entries: dict[str, dict[str, Any]] = {}
        with together(), _write_errors():
            entries = self._write_rank(temporary, optimizer, rank, with_moments=progress.adam_step > 0)
        every_rank: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every_rank, entries)
        with together(), _write_errors():
            if rank == 0:
                files = {name: entry for one in every_rank for name, entry in one.items()}
                self._commit(temporary, files, progress)
        return self.folder / folder_name(progress.step)

    def check(self, start: int) -> None:
        """Make sure, before the first step, that this run can write here and will not mix with another one's.

        Raises:
            CheckpointError: the folder cannot be written, or holds checkpoints of steps beyond `start`.
        """
        with _write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink()
        beyond = [path.name for path in complete_checkpoints(self.folder) if path.name > folder_name(start)]
        if beyond:
            raise CheckpointError(
                "--save",
                str(self.folder),
                f"holds no checkpoint beyond the step the run starts from ({start}), but {beyond[-1]} is there",
                "resume from it with --load, choose another folder, or remove it",
            )

    def _clear_leftovers(self) -> None:
        for leftover in self.folder.glob(".step_*.tmp"):  # of saves that were killed
            shutil.rmtree(leftover)

    def _write_rank(self, folder: Path, optimizer: Any, rank: int, *, with_moments: bool) -> dict[str, dict[str, Any]]:
        """Write this rank's files; their lines in the manifest (each rank hashes its own, all at once)."""
        place = self.topology.coordinate(rank)
        owned = [f for f in fragments(optimizer) if _is_ours_to_write(f, place.tensor)]
        _write_fragments(folder / f"weights_{rank:05d}.safetensors", owned, ("weight",))
        if with_moments:  # Adam makes them at its first step
            _write_fragments(folder / f"optimizer_{rank:05d}.safetensors", owned, ("exp_avg", "exp_avg_sq"))
        states = {"cpu": torch.get_rng_state()}
        device_state = device_rng_state()
        if device_state is not None:
            states["device"] = device_state
        _write_tensors(folder / f"rng_{rank:05d}.safetensors", states, {})
        return {path.name: file_entry(path) for path in folder.glob(f"*_{rank:05d}.safetensors")}

    def _commit(self, temporary: Path, files: dict[str, dict[str, Any]], progress: Progress) -> None:
        self.write_config(temporary / "config.yaml")
        if progress.probe_kept is not None:
            _write_tensors(temporary / PROBE, {"kept": progress.probe_kept}, {})
        if self.extras is not None:
            shutil.copytree(self.extras, temporary / self.extras.name)
        others = (p for p in temporary.rglob("*") if p.is_file() and p.name not in files)
        files |= {str(path.relative_to(temporary)): file_entry(path) for path in others}
        manifest = Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            adam_step=progress.adam_step,
            score_threshold=progress.score_threshold,
            architecture=self.architecture,
            layout={"pipeline": self.topology.pipeline, "data": self.topology.data, "tensor": self.topology.tensor},
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            sample_order=self.sample_order,
            data=progress.data,
            files=dict(sorted(files.items())),
            versions=dict(versions()),
        )
        manifest.write(temporary)
        os.rename(temporary, self.folder / folder_name(progress.step))
        sync_folder(self.folder)
        write_durably(self.folder / "latest", folder_name(progress.step).encode())


@contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or "checkpoint"
        raise CheckpointError(
            "--save",
            str(where),
            f"can be written ({getattr(error, 'strerror', None) or error})",
            "free or choose another disk; earlier checkpoints are unharmed",
        ) from error


def _is_ours_to_write(fragment: Fragment, tensor_rank: int) -> bool:
    """Copies are written once: tensor rank 0's of replicated weights, the first stage's of a tied one."""
    parameter = fragment.parameter
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return tensor_rank == 0 or bool(getattr(parameter, "tensor_model_parallel", False))


def _write_fragments(path: Path, owned: list[Fragment], quantities: tuple[Quantity, ...]) -> None:
    """One file: 1-D tensors keyed `number.quantity`, and in its header which piece of what each number is."""
    tensors: dict[str, Tensor] = {}
    pieces: list[dict[str, Any]] = []
    for fragment in owned:
        for part, offset in parts_with_offsets(fragment.parameter):
            low, high = max(fragment.begin, offset), min(fragment.end, offset + part.numel)
            if low >= high:
                continue
            for quantity in quantities:
                held = fragment.view(quantity)[low - fragment.begin : high - fragment.begin]
                tensors[f"{len(pieces)}.{quantity}"] = held
            pieces.append(_describe(part, low - offset, high - offset))
    _write_tensors(path, tensors, {"pieces": json.dumps(pieces)})


def _describe(part: Part, begin: int, end: int) -> dict[str, Any]:
    return {
        "name": part.name,
        "shape": part.shape,
        "dim": part.dim,
        "start": part.start,
        "length": part.length,
        "begin": begin,
        "end": end,
    }


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata=metadata)
    with path.open("rb") as file:
        os.fsync(file.fileno())
