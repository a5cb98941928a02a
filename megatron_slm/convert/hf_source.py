"""The weights of a Hugging Face folder, read slice by slice from its safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.checkpoint.format import file_sha256
from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.errors import WeightsError
from megatron_slm.parallel.shards import Part


class HuggingFaceSource:
    """A `WeightSource` over `*.safetensors`; the names of a Hugging Face Llama are the logical names.

    Raises:
        WeightsError: no safetensors files (pickled weights are not read), or one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise WeightsError(
                str(folder),
                sorted(p.name for p in folder.glob("*"))[:8],
                "holds *.safetensors files (pickles are not read)",
                "convert with transformers: model.save_pretrained(FOLDER)",
            )
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise WeightsError(str(path), str(error), "is a whole safetensors file", "download it again") from error
        self._check_index()

    def _check_index(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            missing = set(json.loads(index.read_text())["weight_map"]) - set(self._files)
            if missing:
                raise WeightsError(
                    str(index),
                    sorted(missing)[0],
                    "names only tensors that the files hold",
                    "download the missing shards",
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        out = {}
        for name, path in self._files.items():
            with safe_open(path, framework="pt") as file:
                out[name] = tuple(file.get_slice(name).get_shape())
        return out

    def content_sha256(self) -> str:
        """SHA-256 over the folder's safetensors files: every byte is read."""
        paths = sorted({*self._files.values()})
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            digests = list(pool.map(file_sha256, paths))
        weights = [(path.name, digest) for path, digest in zip(paths, digests, strict=True)]
        return hashlib.sha256(json.dumps(weights).encode()).hexdigest()

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """See `WeightSource.read`; there are no moments here, so they are zero."""
        if quantity != "weight":
            return torch.zeros(end - begin)
        if part.name not in self._files:
            raise WeightsError(str(self.folder), part.name, "is among its tensors", "use a folder of this architecture")
        with safe_open(self._files[part.name], framework="pt") as file:
            held = file.get_slice(part.name)
            shape = tuple(held.get_shape())
            if shape != part.shape:
                raise WeightsError(
                    f"{self.folder}: {part.name}",
                    shape,
                    f"has shape {part.shape}",
                    "use a folder whose config.json fits its weights",
                )
            stop = part.start + part.length
            if part.dim is None:
                local = held[:]
            else:
                local = held[part.start : stop] if part.dim == 0 else held[:, part.start : stop]
        return local.reshape(-1)[begin:end].float()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whole, one at a time, in its stored dtype."""
        for name, path in self._files.items():
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
