"""The weights of a Hugging Face folder of pickled `.bin` files, for importing only."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.convert.hf_source import BIN, weight_files
from megatron_slm.errors import WeightsError


class BinSource:
    """A `TensorSource` over `pytorch_model*.bin`, read with `weights_only`: tensors and nothing else are unpickled.

    One file is open at a time, mapped into memory; one of the format before torch 1.6 is read whole.

    Raises:
        WeightsError: no such files, one that holds more than tensors or is damaged, or an index that does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        listed = weight_files(folder, BIN)
        if not listed:
            found = sorted(path.name for path in folder.glob("*"))[:12]
            raise WeightsError(str(folder), found, f"holds {BIN} or its index", "check the path")
        for file in dict.fromkeys(listed.values() if isinstance(listed, dict) else listed):
            for name, tensor in self._load(folder / file).items():
                self._paths[name] = folder / file
                self._shapes[name], self._dtypes[name] = tuple(tensor.shape), tensor.dtype
        for name, file in listed.items() if isinstance(listed, dict) else ():
            if name not in self._paths or self._paths[name].name != file:
                raise WeightsError(
                    f"{folder}/{BIN}.index.json: {name}", "not there", f"is in {file}", "download the folder again"
                )

    def _load(self, path: Path) -> dict[str, Tensor]:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self._open = None  # let go of the file before the next one
        try:
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise WeightsError(
                str(path),
                str(error).strip().splitlines()[0],
                "is a whole .bin file that holds tensors only (it is read with weights_only)",
                "download it again; do not load it otherwise unless you trust who made it",
            ) from error
        others = [k for k, v in loaded.items() if not isinstance(v, Tensor)] if isinstance(loaded, dict) else ["all"]
        if others:
            raise WeightsError(
                str(path), others[0], "is a tensor, as everything in a state dict is", "use another folder"
            )
        self._open = (path, loaded)
        return self._open[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every tensor."""
        return dict(self._dtypes)

    def files(self) -> dict[str, str]:
        """Name of every tensor and the path of the file it is in."""
        return {name: str(path) for name, path in self._paths.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension, in the stored dtype."""
        return self._load(self._paths[name])[name][start:stop]
