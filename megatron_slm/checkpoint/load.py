"""Reading a checkpoint at any layout."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_slm.checkpoint.format import PROBE, Manifest
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.weights import Quantity, slice_of
from megatron_slm.device import set_device_rng_state
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.shards import Part


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of one slice of a logical tensor, under `number` in a rank's files."""

    file_number: str
    number: int
    part: Part
    begin: int
    end: int


class CheckpointSource:
    """The logical tensors of a checkpoint, read piece by piece (a `WeightSource`).

    A slice that was written as it is asked for is read directly; any other is put together from the whole
    tensor's pieces, one tensor at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        self._last: tuple[str, Quantity, Tensor] | None = None
        for path in sorted(folder.glob("weights_*.safetensors")):
            file_number = path.stem.partition("_")[2]
            with _readable(path), safe_open(path, framework="pt") as file:
                for number, piece in enumerate(json.loads(file.metadata()["pieces"])):
                    part = Part(
                        name=piece["name"],
                        shape=tuple(piece["shape"]),
                        dim=piece["dim"],
                        start=piece["start"],
                        length=piece["length"],
                    )
                    self._pieces[part.name].append(_Piece(file_number, number, part, piece["begin"], piece["end"]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every logical tensor."""
        return {name: pieces[0].part.shape for name, pieces in self._pieces.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every logical tensor: fp32, but for what an imported model had."""
        return {name: self._tensor(pieces[0], "weight").dtype for name, pieces in self._pieces.items()}

    def files(self) -> dict[str, str]:
        """Name of every logical tensor and the path of the first file that holds some of it."""
        return {name: str(self._path(pieces[0], "weight")) for name, pieces in self._pieces.items()}

    def content_sha256(self) -> str:
        """SHA-256 over the weights' files as they were written; another layout's files give another one."""
        files = Manifest.read(self.folder).files
        weights = sorted((name, entry["sha256"]) for name, entry in files.items() if name.startswith("weights_"))
        return hashlib.sha256(json.dumps(weights).encode()).hexdigest()

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """See `WeightSource.read`."""
        pieces = self._pieces.get(part.name)
        if pieces is None:
            raise CheckpointError("checkpoint", str(self.folder), f"holds {part.name}", "load another checkpoint")
        if pieces[0].part.shape != part.shape:
            raise CheckpointError(
                part.name,
                pieces[0].part.shape,
                f"has shape {part.shape} in this model",
                "load a checkpoint of the same architecture and vocabulary",
            )
        alike = [piece for piece in pieces if piece.part == part]
        if alike:
            return self._gather(quantity, alike, begin, end)
        if self._last is None or self._last[:2] != (part.name, quantity):
            self._last = (part.name, quantity, self.whole(part.name, quantity))
        return slice_of(self._last[2], part, begin, end)

    def whole(self, name: str, quantity: Quantity = "weight") -> Tensor:
        """A whole logical tensor, fp32."""
        return self._rows(name, quantity, 0, self._pieces[name][0].part.shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight along its first dimension, fp32; no file stays mapped afterwards."""
        try:
            return self._rows(name, "weight", start, stop)
        finally:
            self._open.clear()

    def _rows(self, name: str, quantity: Quantity, start: int, stop: int) -> Tensor:
        pieces = self._pieces[name]
        out = torch.empty((stop - start, *pieces[0].part.shape[1:]))
        missing = out.numel()
        for part in {piece.part for piece in pieces}:
            alike = [piece for piece in pieces if piece.part == part]
            width = prod(part.local_shape[1:])
            first = part.start if part.dim == 0 else 0  # a slice along dim 0 begins at that row, any other at row 0
            low, high = max(start, first), min(stop, first + part.local_shape[0])
            if low < high:
                held = self._gather(quantity, alike, (low - first) * width, (high - first) * width)
                target = out[low - start : high - start]
                if part.dim == 1:
                    target = target.narrow(1, part.start, part.length)
                target.copy_(held.view(target.shape))
                missing -= target.numel()
        if missing:
            raise self._incomplete(name)
        return out

    def _gather(self, quantity: Quantity, pieces: list[_Piece], begin: int, end: int) -> Tensor:
        out = torch.empty(end - begin)
        missing = end - begin
        for piece in pieces:
            low, high = max(begin, piece.begin), min(end, piece.end)
            if low < high:
                held = self._tensor(piece, quantity)
                out[low - begin : high - begin] = held[low - piece.begin : high - piece.begin]
                missing -= high - low
        if missing:
            raise self._incomplete(pieces[0].part.name)
        return out

    def _incomplete(self, name: str) -> CheckpointError:
        return CheckpointError("checkpoint", str(self.folder), f"holds all of {name}", "load another checkpoint")

    def _tensor(self, piece: _Piece, quantity: Quantity) -> Tensor:
        path = self._path(piece, quantity)
        if path not in self._open:
            with _readable(path):
                self._open[path] = safe_open(path, framework="pt")
        with _readable(path):
            return self._open[path].get_tensor(f"{piece.number}.{quantity}")

    def _path(self, piece: _Piece, quantity: Quantity) -> Path:
        kind = "weights" if quantity == "weight" else "optimizer"
        return self.folder / f"{kind}_{piece.file_number}.safetensors"


def load_state(folder: Path, manifest: Manifest) -> RunState:
    """Load the state of the run that wrote a checkpoint, as a copy.

    Raises:
        CheckpointError: a file that holds a part of it cannot be read.
    """
    state = deepcopy(manifest.state)
    if PROBE in manifest.files:
        with _readable(folder / PROBE):
            state.probe_kept = load_file(folder / PROBE)["kept"]
    return state


def restore_rng(folder: Path, manifest: Manifest, rank: int) -> None:
    """Put back a rank's random state. A rank the checkpoint's layout did not have keeps its own."""
    path = folder / f"rng_{rank:05d}.safetensors"
    if path.name in manifest.files:
        with _readable(path):
            states = load_file(path)
            torch.set_rng_state(states["cpu"])
            if "device" in states:
                set_device_rng_state(states["device"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that is not what a save wrote, and whose checksum was not compared, is named."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            str(path), "content", f"is what a save wrote ({error})", "load another checkpoint"
        ) from error
