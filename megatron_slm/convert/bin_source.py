"""Weights in pickled `.bin` files of a Hugging Face folder; for import only."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.convert.hf_source import BIN, weight_files
from megatron_slm.errors import WeightsError


class BinSource:
    """`TensorSource` over `pytorch_model*.bin`, loaded with `weights_only`: nothing but tensors is unpickled.

    One file is open at a time, memory-mapped; files older than torch 1.6 are loaded whole.

    Raises:
        WeightsError: the files are missing or damaged, hold other objects than tensors, or contradict their index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        listed = weight_files(folder, BIN)
        if not listed:
            raise WeightsError.missing(f"{folder / BIN}", "--allow-bin", "check the path, or download the weights")
        for file in dict.fromkeys(listed.values() if isinstance(listed, dict) else listed):
            for name, tensor in self._load(folder / file).items():
                self._paths[name] = folder / file
                self._shapes[name], self._dtypes[name] = tuple(tensor.shape), tensor.dtype
        for name, file in listed.items() if isinstance(listed, dict) else ():
            if name not in self._paths or self._paths[name].name != file:
                raise WeightsError(
                    f"{folder / BIN}.index.json: weight_map.{name}",
                    file,
                    "name the file that holds this tensor",
                    "download the folder again",
                )

    def _load(self, path: Path) -> dict[str, Tensor]:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self._open = None  # unmap the file before the next one
        try:
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0].split(". ")[0]  # the rest is advice to load it regardless
            raise WeightsError(
                "--hf: weight file",
                str(path),
                f"hold nothing but tensors and be undamaged (torch.load with weights_only: {reason})",
                "download it again; load it by other means only if you trust its author",
            ) from error
        if not isinstance(loaded, dict):
            raise WeightsError("--hf: weight file", str(path), "hold a state dict of tensors", "use another folder")
        for name, value in loaded.items():
            if not isinstance(value, Tensor):
                raise WeightsError(f"{path}: {name}", type(value).__name__, "be a tensor", "use another folder")
        self._open = (path, loaded)
        return self._open[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of every tensor by name."""
        return dict(self._dtypes)

    def files(self) -> dict[str, str]:
        """Return the path of the file that holds each tensor, by tensor name."""
        return {name: str(path) for name, path in self._paths.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along the first dimension, in the stored dtype."""
        return self._load(self._paths[name])[name][start:stop]
