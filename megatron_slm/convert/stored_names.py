"""Names and fusions of the tensors in Hugging Face folders of families that store them in another way than Llama."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families import family_named
from megatron_slm.convert.hf_config import read_config
from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.convert.tensors import TensorSource, expected_tensors
from megatron_slm.parallel.shards import Part


def stored_tensors(names: Iterable[str], modules: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the logical tensors of every stored tensor, by its name, in the order of its rows.

    Args:
        names: logical names, in the model's order.
        modules: name of the stored module by that of the logical one; several of one stored module are fused in it.
    """
    out: dict[str, list[str]] = {}
    for name in names:
        *outer, module, kind = name.split(".")
        out.setdefault(".".join([*outer, modules.get(module, module), kind]), []).append(name)
    return out


@dataclass(frozen=True)
class _Rows:
    """Rows of a stored tensor that are a logical one."""

    stored: str
    start: int
    shape: tuple[int, ...]


def stored_modules(folder: Path) -> Mapping[str, str]:
    """Return the stored modules of a Hugging Face folder's family, whose configuration was read."""
    family = family_named(read_config(folder)["model_type"])
    assert family is not None, "its architecture was read"
    return family.stored_modules


class LogicalSource:
    """`TensorSource` of logical tensors over one of stored ones.

    Args:
        expected: shapes of the logical tensors.
        modules: as in `stored_tensors`.
    """

    def __init__(
        self, source: TensorSource, expected: Mapping[str, tuple[int, ...]], modules: Mapping[str, str]
    ) -> None:
        self.source = source
        self._rows: dict[str, _Rows] = {}
        by_stored, found = stored_tensors(expected, modules), source.shapes()
        for stored, shape in found.items():
            start = 0
            logical = by_stored.get(stored, [stored])
            for name in logical:  # the last one shows what a stored tensor has too many or too few of
                rows = shape[0] - start if name == logical[-1] else expected[name][0]
                self._rows[name] = _Rows(stored, start, (rows, *shape[1:]))
                start += rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return {name: rows.shape for name, rows in self._rows.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of every tensor by name."""
        dtypes = self.source.dtypes()
        return {name: dtypes[rows.stored] for name, rows in self._rows.items()}

    def files(self) -> dict[str, str]:
        """Return the path of the file that holds each tensor, by tensor name."""
        files = self.source.files()
        return {name: files[rows.stored] for name, rows in self._rows.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) along a tensor's first dimension, in the stored dtype."""
        rows = self._rows[name]
        return self.source.rows(rows.stored, rows.start + start, rows.start + stop)


class LogicalWeights(LogicalSource):
    """The same over a folder's safetensors, from which modules are filled too."""

    source: HuggingFaceSource

    @classmethod
    def of_folder(cls, folder: Path, arch: Architecture) -> LogicalWeights:
        """Open a folder's safetensors, whose architecture was read.

        Raises:
            WeightsError: the files are missing or damaged.
        """
        return cls(HuggingFaceSource(folder), expected_tensors(arch), stored_modules(folder))

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.source.folder

    def content_sha256(self) -> str:
        """Return the SHA-256 over the folder's safetensors files; reads every byte."""
        return self.source.content_sha256()

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of a part of a tensor, flattened, in fp32 (see `WeightSource.read`)."""
        rows = self._rows.get(part.name)
        if rows is None or rows.shape != part.shape:
            return self.source.read(quantity, part, begin, end)  # names what is wrong
        shape = self.source.shapes()[rows.stored]
        if shape == part.shape:
            return self.source.read(quantity, replace(part, name=rows.stored), begin, end)
        start, length = (part.start, part.length) if part.dim == 0 else (0, part.shape[0])
        assert part.dim in (None, 0), "tensors are fused along their rows, and cut along them"
        fused = Part(name=rows.stored, shape=shape, dim=0, start=rows.start + start, length=length)
        return self.source.read(quantity, fused, begin, end)
