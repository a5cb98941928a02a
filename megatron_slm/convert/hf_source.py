"""Weights of a Hugging Face folder, read slice by slice from its safetensors files."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.errors import WeightsError
from megatron_slm.files import file_sha256
from megatron_slm.parallel.shards import Part

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


def weight_files(folder: Path, single: str) -> dict[str, str] | list[str]:
    """List the weight files as transformers does: those of the index, else the single file.

    Other files of the same kind (Mistral's `consolidated.safetensors`, optimizer states) are ignored.

    Args:
        single: `model.safetensors` or `pytorch_model.bin`; the index is named `{single}.index.json`.

    Returns:
        With an index, the file of each tensor by name; else the single file in a list, empty if there is none.

    Raises:
        WeightsError: the index is unreadable, or a shard is missing.
    """
    index = folder / f"{single}.index.json"
    if not index.exists():
        return [single] if (folder / single).exists() else []
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            "weight index",
            str(index),
            f"be JSON with a weight_map ({type(error).__name__}: {error})",
            "download it again",
        ) from error
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise WeightsError(
                f"{index}: weight_map", name, "name only files of its own folder", "download the folder again"
            )
        if not (folder / name).is_file():
            raise WeightsError.missing(str(folder / name), index.name, "download this shard")
    return weight_map


class HuggingFaceSource:
    """`TensorSource` over safetensors; Hugging Face's tensor names are the logical names.

    Opens a file for each read and closes it again, so that no file stays in memory.

    Raises:
        WeightsError: the files are missing or damaged, or contradict their index. `.bin` files are not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        listed = weight_files(folder, SAFETENSORS)
        if not listed:
            raise _no_safetensors(folder)
        for name in dict.fromkeys(listed.values() if isinstance(listed, dict) else listed):
            self._read_header(folder / name)
        if isinstance(listed, dict):
            self._check_index(listed)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    tensor = file.get_slice(name)
                    self._paths[name] = path
                    self._shapes[name] = tuple(tensor.get_shape())
                    self._dtypes[name] = _DTYPES.get(tensor.get_dtype(), torch.uint8)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                "weight file", str(path), f"be an undamaged safetensors file ({error})", "download it again"
            ) from error

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder / f"{SAFETENSORS}.index.json"
        for name, file in weight_map.items():
            if name not in self._paths or self._paths[name].name != file:
                holder = self._paths[name].name if name in self._paths else "none does"
                raise WeightsError(
                    f"{index}: weight_map.{name}",
                    file,
                    f"name the file that holds this tensor ({holder})",
                    "download the folder again",
                )
        unlisted = sorted(self._paths.keys() - weight_map.keys())
        if unlisted:
            name = unlisted[0]
            raise WeightsError.missing(
                f"{index}: weight_map.{name}",
                f"{self._paths[name].name}, which holds this tensor",
                "download the folder again",
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of every tensor by name."""
        return dict(self._dtypes)

    def files(self) -> dict[str, str]:
        """Return the path of the file that holds each tensor, by tensor name."""
        return {name: str(path) for name, path in self._paths.items()}

    def content_sha256(self) -> str:
        """Return the SHA-256 over the folder's safetensors files; reads every byte."""
        paths = sorted({*self._paths.values()})
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            digests = list(pool.map(file_sha256, paths))
        weights = [(path.name, digest) for path, digest in zip(paths, digests, strict=True)]
        return hashlib.sha256(json.dumps(weights).encode()).hexdigest()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along the first dimension, in the stored dtype."""
        return self._slice(name, lambda tensor: tensor[start:stop])

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of a part of a tensor, flattened, in fp32; the optimizer's moments are zero.

        Raises:
            WeightsError: the tensor is missing or has another shape.
        """
        if quantity != "weight":
            return torch.zeros(end - begin)
        if part.name not in self._paths:
            raise WeightsError.missing(
                f"{self.folder}: {part.name}", "the model's architecture", "use weights of this architecture"
            )
        if self._shapes[part.name] != part.shape:
            raise WeightsError(
                f"{self._paths[part.name]}: shape of {part.name}",
                self._shapes[part.name],
                f"be {part.shape}, by config.json",
                "use a folder whose config.json and weights belong together",
            )
        width = prod(part.local_shape[1:])
        first, last = begin // width, ceil_div(end, width)  # the rows of the part that hold these elements
        row = part.start if part.dim == 0 else 0

        def take(tensor: Any) -> Any:
            rows = slice(row + first, row + last)
            return tensor[rows, part.start : part.start + part.length] if part.dim == 1 else tensor[rows]

        return self._slice(part.name, take).reshape(-1)[begin - first * width : end - first * width].float()

    def _slice(self, name: str, take: Any) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            taken: Tensor = take(file.get_slice(name))
        return taken


def _no_safetensors(folder: Path) -> WeightsError:
    fix = "check the path, or download the weights"
    if any(folder.glob("pytorch_model*.bin*")):
        fix = "convert the .bin files first: tools/convert_checkpoint.py import --allow-bin"
    rule = "required to load a model (.bin files are pickled and not loaded)"
    return WeightsError(str(folder / SAFETENSORS), None, rule, fix)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Dtypes by safetensors' names; `check_tensors` rejects all others."""
