"""The weights of a Hugging Face folder, read slice by slice from its safetensors files."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.errors import WeightsError
from megatron_slm.files import file_sha256
from megatron_slm.parallel.shards import Part

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


def weight_files(folder: Path, single: str) -> dict[str, str] | list[str]:
    """Which files hold the weights, as transformers decides: those of the index, else the single file.

    Other files of the same kind (Mistral's `consolidated.safetensors`, the optimizer's) are not the model's.

    Args:
        single: `model.safetensors` or `pytorch_model.bin`; its index has `.index.json` behind.

    Returns:
        of an index, each tensor's file; else the one file's name, or nothing.

    Raises:
        WeightsError: the index cannot be read, or a file that it names is missing.
    """
    index = folder / f"{single}.index.json"
    if not index.exists():
        return [single] if (folder / single).exists() else []
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            str(index), f"{type(error).__name__}: {error}", "is JSON with a weight_map", "download it again"
        ) from error
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(
                str(index), name, "names only files that are in the folder", "download the missing shard"
            )
    return weight_map


class HuggingFaceSource:
    """A `TensorSource` over safetensors; the names of Hugging Face's tensors are the logical names.

    Files are opened for each read and closed again, so that none of them stays in memory.

    Raises:
        WeightsError: no safetensors files (pickles are not read here), one is damaged, or the index does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        listed = weight_files(folder, SAFETENSORS)
        if not listed:
            raise WeightsError(
                str(folder),
                sorted(p.name for p in folder.glob("*"))[:12],
                f"holds {SAFETENSORS} or its index (pickles are not read)",
                "of a .bin folder make a checkpoint: tools/convert_checkpoint.py import --allow-bin",
            )
        for name in dict.fromkeys(listed.values() if isinstance(listed, dict) else listed):
            self._read_header(folder / name)
        if isinstance(listed, dict):
            self._check_index(listed)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    held = file.get_slice(name)
                    self._paths[name] = path
                    self._shapes[name] = tuple(held.get_shape())
                    self._dtypes[name] = _DTYPES.get(held.get_dtype(), torch.uint8)
        except (SafetensorError, OSError) as error:
            raise WeightsError(str(path), str(error), "is a whole safetensors file", "download it again") from error

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder / f"{SAFETENSORS}.index.json"
        for name, file in weight_map.items():
            if name not in self._paths or self._paths[name].name != file:
                found = self._paths[name].name if name in self._paths else "in none of the files"
                raise WeightsError(
                    f"{index}: {name}", found, f"is in {file}, as the index says", "download the folder again"
                )
        extra = sorted(self._paths.keys() - weight_map.keys())
        if extra:
            raise WeightsError(
                f"{index}: {extra[0]}",
                f"only in {self._paths[extra[0]].name}",
                "is named by the index, as every tensor of its files is",
                "download the folder again",
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every tensor."""
        return dict(self._dtypes)

    def files(self) -> dict[str, str]:
        """Name of every tensor and the path of the file it is in."""
        return {name: str(path) for name, path in self._paths.items()}

    def content_sha256(self) -> str:
        """SHA-256 over the folder's safetensors files: every byte is read."""
        paths = sorted({*self._paths.values()})
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            digests = list(pool.map(file_sha256, paths))
        weights = [(path.name, digest) for path, digest in zip(paths, digests, strict=True)]
        return hashlib.sha256(json.dumps(weights).encode()).hexdigest()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension, in the stored dtype."""
        return self._slice(name, lambda held: held[start:stop])

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """See `WeightSource.read`; there are no moments here, so they are zero."""
        if quantity != "weight":
            return torch.zeros(end - begin)
        if part.name not in self._paths:
            raise WeightsError(str(self.folder), part.name, "is among its tensors", "use a folder of this architecture")
        if self._shapes[part.name] != part.shape:
            raise WeightsError(
                f"{self._paths[part.name]}: {part.name}",
                self._shapes[part.name],
                f"has shape {part.shape}",
                "use a folder whose config.json fits its weights",
            )
        stop = part.start + part.length

        def take(held: Any) -> Any:
            if part.dim is None:
                return held[:]
            return held[part.start : stop] if part.dim == 0 else held[:, part.start : stop]

        return self._slice(part.name, take).reshape(-1)[begin:end].float()

    def _slice(self, name: str, take: Any) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            taken: Tensor = take(file.get_slice(name))
        return taken


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Of safetensors' names; whatever else is stored is no weight of ours, and is refused by `check_tensors`."""
