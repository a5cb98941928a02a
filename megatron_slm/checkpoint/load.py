"""Reads a checkpoint at any layout."""

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
from megatron_slm.checkpoint.weights import Quantity, cut_range
from megatron_slm.device import set_device_rng_state
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.shards import Part


@dataclass(frozen=True)
class _Slice:
    """Elements [begin, end) of a tensor-parallel rank's part of a logical tensor, `number` in a rank's files."""

    file_number: str
    number: int
    part: Part
    begin: int
    end: int


class CheckpointSource:
    """The logical tensors of a checkpoint (a `WeightSource`).

    A part that was saved with the same bounds is read directly; any other is cut from the whole tensor, one tensor at
    a time.

    Args:
        kind: prefix of the files: `weights` (and `optimizer`) are the model's.
    """

    def __init__(self, folder: Path, *, kind: str = "weights") -> None:
        self.folder, self._kind = folder, kind
        self._slices: dict[str, list[_Slice]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        self._last: tuple[str, Quantity, Tensor] | None = None
        for path in sorted(folder.glob(f"{kind}_*.safetensors")):
            file_number = path.stem.partition("_")[2]
            with _readable(path), safe_open(path, framework="pt") as file:
                for number, entry in enumerate(json.loads(file.metadata()["pieces"])):
                    part = Part(
                        name=entry["name"],
                        shape=tuple(entry["shape"]),
                        dim=entry["dim"],
                        start=entry["start"],
                        length=entry["length"],
                    )
                    self._slices[part.name].append(_Slice(file_number, number, part, entry["begin"], entry["end"]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every logical tensor."""
        return {name: slices[0].part.shape for name, slices in self._slices.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every logical tensor: fp32, or an imported model's own dtype."""
        return {name: self._tensor(slices[0], "weight").dtype for name, slices in self._slices.items()}

    def files(self) -> dict[str, str]:
        """Name of every logical tensor and the path of the first file with a slice of it."""
        return {name: str(self._path(slices[0], "weight")) for name, slices in self._slices.items()}

    def content_sha256(self) -> str:
        """SHA-256 over the weight files; it depends on the layout that saved them."""
        files = Manifest.read(self.folder).files
        weights = sorted((name, entry["sha256"]) for name, entry in files.items() if name.startswith("weights_"))
        return hashlib.sha256(json.dumps(weights).encode()).hexdigest()

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Read elements [begin, end) of a flattened part, fp32 (see `WeightSource.read`)."""
        slices = self._slices.get(part.name)
        if slices is None:
            raise CheckpointError("checkpoint", str(self.folder), f"contain {part.name}", "load another checkpoint")
        if slices[0].part.shape != part.shape:
            raise CheckpointError(
                f"{self.folder}: shape of {part.name}",
                slices[0].part.shape,
                f"be {part.shape}, as in this model",
                "load a checkpoint of the same architecture and vocabulary",
            )
        alike = [slice_ for slice_ in slices if slice_.part == part]
        if alike:
            return self._gather(quantity, alike, begin, end)
        if self._last is None or self._last[:2] != (part.name, quantity):
            self._last = (part.name, quantity, self.whole(part.name, quantity))
        return cut_range(self._last[2], part, begin, end)

    def whole(self, name: str, quantity: Quantity = "weight") -> Tensor:
        """Read a whole logical tensor, fp32."""
        return self._rows(name, quantity, 0, self._slices[name][0].part.shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a weight along its first dimension, fp32, and unmap the files."""
        try:
            return self._rows(name, "weight", start, stop)
        finally:
            self._open.clear()

    def _rows(self, name: str, quantity: Quantity, start: int, stop: int) -> Tensor:
        slices = self._slices[name]
        out = torch.empty((stop - start, *slices[0].part.shape[1:]))
        missing = out.numel()
        for part in {slice_.part for slice_ in slices}:
            alike = [slice_ for slice_ in slices if slice_.part == part]
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

    def _gather(self, quantity: Quantity, slices: list[_Slice], begin: int, end: int) -> Tensor:
        out = torch.empty(end - begin)
        missing = end - begin
        for slice_ in slices:
            low, high = max(begin, slice_.begin), min(end, slice_.end)
            if low < high:
                held = self._tensor(slice_, quantity)
                out[low - begin : high - begin] = held[low - slice_.begin : high - slice_.begin]
                missing -= high - low
        if missing:
            raise self._incomplete(slices[0].part.name)
        return out

    def _incomplete(self, name: str) -> CheckpointError:
        return CheckpointError("checkpoint", str(self.folder), f"contain all of {name}", "load another checkpoint")

    def _tensor(self, slice_: _Slice, quantity: Quantity) -> Tensor:
        path = self._path(slice_, quantity)
        if path not in self._open:
            with _readable(path):
                self._open[path] = safe_open(path, framework="pt")
        with _readable(path):
            return self._open[path].get_tensor(f"{slice_.number}.{quantity}")

    def _path(self, slice_: _Slice, quantity: Quantity) -> Path:
        kind = self._kind if quantity == "weight" else "optimizer"
        return self.folder / f"{kind}_{slice_.file_number}.safetensors"


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
    """Restore a rank's random state. A rank that the checkpoint's layout did not have keeps its own."""
    path = folder / f"rng_{rank:05d}.safetensors"
    if path.name in manifest.files:
        with _readable(path):
            states = load_file(path)
            torch.set_rng_state(states["cpu"])
            if "device" in states:
                set_device_rng_state(states["device"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Translate the errors of a damaged file, whose checksum need not have been compared."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            str(path), "damaged", f"be as it was saved ({error})", "load another checkpoint"
        ) from error
