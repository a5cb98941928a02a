"""Reads a checkpoint at any layout."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.format import PROBE, Manifest
from megatron_slm.checkpoint.slices import Slice, file_name, readable, slices_in, slices_in_headers
from megatron_slm.checkpoint.snapshot import RNG_CPU, RNG_DEVICE
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.device import set_device_rng_state
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.shards import Part

BLOCK_ELEMENTS = 2**22
"""Number of elements that are in memory beside the result while a part is cut from another layout's slices."""


class CheckpointSource:
    """The logical tensors of a checkpoint (a `WeightSource`).

    A part that was saved with the same bounds is read directly; any other is put together from the rows and columns
    of the parts that overlap it. A file is opened when something in it is read.

    Args:
        manifest: the checkpoint's, for its tables; without it the headers of all files are read.
        kind: prefix of the files: `weights` (and `optimizer`) are the model's.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None, *, kind: str = "weights") -> None:
        self.folder, self._kind = folder, kind
        self._slices = slices_in_headers(folder, kind) if manifest is None else slices_in(folder, manifest.files, kind)
        self._open: dict[Path, Any] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every logical tensor."""
        return {name: slices[0].part.shape for name, slices in self._slices.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every logical tensor: fp32, or an imported model's own dtype."""
        return {name: self._tensor(slices[0], "weight", 0, 0).dtype for name, slices in self._slices.items()}

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
        width = prod(part.local_shape[1:])
        first, last = begin // width, ceil_div(end, width)
        row = part.start if part.dim == 0 else 0
        columns = (part.start, part.length) if part.dim == 1 else (0, width)
        rows = self._region(part.name, quantity, row + first, row + last, *columns)
        return rows.view(-1)[begin - first * width : end - first * width]

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
        shape = self._slices[name][0].part.shape[1:]
        return self._region(name, quantity, start, stop, 0, prod(shape)).view(stop - start, *shape)

    def _region(self, name: str, quantity: Quantity, start: int, stop: int, column: int, width: int) -> Tensor:
        """Read rows [start, stop) and `width` columns from `column` of a tensor, taken as a matrix: [rows, width]."""
        by_part: dict[Part, list[Slice]] = {}
        for slice_ in self._slices[name]:
            by_part.setdefault(slice_.part, []).append(slice_)
        out = torch.empty(stop - start, width)
        missing = out.numel()
        for part, alike in by_part.items():
            held_width = prod(part.local_shape[1:])
            first_row = part.start if part.dim == 0 else 0
            first_column = part.start if part.dim == 1 else 0
            left, right = max(column, first_column), min(column + width, first_column + held_width)
            low, high = max(start, first_row), min(stop, first_row + part.local_shape[0])
            if left >= right:
                continue
            step = max(1, BLOCK_ELEMENTS // held_width)
            for row in range(low, high, step):
                end = min(row + step, high)
                held = self._gather(quantity, alike, (row - first_row) * held_width, (end - first_row) * held_width)
                target = out[row - start : end - start, left - column : right - column]
                target.copy_(held.view(end - row, held_width)[:, left - first_column : right - first_column])
                missing -= target.numel()
        if missing:
            raise self._incomplete(name)
        return out

    def _gather(self, quantity: Quantity, slices: list[Slice], begin: int, end: int) -> Tensor:
        out = torch.empty(end - begin)
        missing = end - begin
        for slice_ in slices:
            low, high = max(begin, slice_.begin), min(end, slice_.end)
            if low < high:
                held = self._tensor(slice_, quantity, low - slice_.begin, high - slice_.begin)
                out[low - begin : high - begin] = held
                missing -= high - low
        if missing:
            raise self._incomplete(slices[0].part.name)
        return out

    def _incomplete(self, name: str) -> CheckpointError:
        return CheckpointError("checkpoint", str(self.folder), f"contain all of {name}", "load another checkpoint")

    def _tensor(self, slice_: Slice, quantity: Quantity, begin: int, end: int) -> Tensor:
        path = self._path(slice_, quantity)
        if path not in self._open:
            with readable(path):
                self._open[path] = safe_open(path, framework="pt")
        with readable(path):
            return self._open[path].get_slice(f"{slice_.number}.{quantity}")[begin:end]

    def _path(self, slice_: Slice, quantity: Quantity) -> Path:
        return self.folder / file_name(self._kind if quantity == "weight" else "optimizer", slice_.file_number)


def load_state(folder: Path, manifest: Manifest) -> RunState:
    """Load the state of the run that wrote a checkpoint, as a copy.

    Raises:
        CheckpointError: a file that holds a part of it cannot be read.
    """
    state = deepcopy(manifest.state)
    if PROBE in manifest.files:
        with readable(folder / PROBE):
            state.probe_kept = load_file(folder / PROBE)["kept"]
    return state


def restore_rng(folder: Path, manifest: Manifest, rank: int) -> None:
    """Restore a rank's random states. A rank that the checkpoint's layout did not have keeps its own."""
    path = folder / file_name("weights", rank)
    names = {"cpu": RNG_CPU, "device": RNG_DEVICE}
    if manifest.format_version == 2:
        path, names = folder / f"rng_{rank:05d}.safetensors", {name: name for name in names}
    if path.name not in manifest.files:
        return
    with readable(path), safe_open(path, framework="pt") as file:
        states = {name: file.get_tensor(key) for name, key in names.items() if key in file.keys()}  # noqa: SIM118
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "device" in states:
            set_device_rng_state(states["device"])
