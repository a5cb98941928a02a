"""Which tensors a model on disk must hold, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.defaults import DTYPE_NAMES
from megatron_slm.errors import WeightsError
from megatron_slm.model.llama import EMBEDDING_NAME, OUTPUT_NAME, layer_list
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import parts_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""What weights may be stored in: all are numbers that fp32 holds exactly."""
EMBEDDING, OUTPUT = f"{EMBEDDING_NAME}.weight", f"{OUTPUT_NAME}.weight"
BLOCK_BYTES = 32 * 2**20
"""About what is held in memory of a tensor that is copied or compared."""


class TensorSource(Protocol):
    """Logical tensors on disk, and what there is of them."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and stored dtype of every tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along a tensor's first dimension, in fp32 or its stored dtype; only they are read."""
        ...

    def files(self) -> dict[str, str]:
        """Name of every tensor and the path of the file it is in."""
        ...


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of an architecture, in the model's order."""
    with torch.device("meta"):
        modules = [maker.make() for maker in layer_list(arch, ParallelLayers(vocabulary_divisible_by=1))]
    return {part.name: part.shape for module in modules for p in module.parameters() for part in parts_of(p)}


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each about `BLOCK_BYTES` in all, that together are a tensor of `shape`."""
    step = max(1, BLOCK_BYTES // (itemsize * prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def check_tensors(arch: Architecture, source: TensorSource, *, field: str) -> None:
    """Compare what a model folder holds with what its architecture needs.

    Buffers of RoPE that old folders have are passed over, and so is a tied output weight that is stored a second
    time, if it is the embedding.

    Args:
        field: the flag that named the folder, for errors.

    Raises:
        WeightsError: a tensor is missing, not expected, or of another shape or dtype; it and its file are named.
    """
    expected, shapes, dtypes, files = expected_tensors(arch), source.shapes(), source.dtypes(), source.files()
    for name, shape in expected.items():
        if name not in shapes:
            raise WeightsError(
                f"{field}: {name}",
                "missing",
                f"has shape {shape}, as the configuration says; {len(shapes)} other tensors are there",
                "use a folder whose weights fit its configuration",
            )
        where = f"{field}: {name} in {files[name]}"
        if shapes[name] != shape:
            raise WeightsError(
                where,
                shapes[name],
                f"has shape {shape}, as the configuration says",
                "use a folder whose weights fit its configuration",
            )
        if dtypes[name] not in DTYPES.values():
            raise WeightsError(
                where,
                str(dtypes[name]).removeprefix("torch."),
                f"is stored as one of {', '.join(DTYPES)}",
                "convert the weights to one of them first",
            )
    for name in shapes.keys() - expected.keys():
        _check_unexpected(name, arch, source, f"{field}: {name} in {files[name]}")


def _check_unexpected(name: str, arch: Architecture, source: TensorSource, where: str) -> None:
    if name.endswith(".rotary_emb.inv_freq"):
        return
    if name == OUTPUT and arch.tied:
        if not _equal(source, OUTPUT, EMBEDDING):
            raise WeightsError(
                where,
                "other values than the embedding",
                "is the embedding itself, because config.json says tie_word_embeddings",
                "set tie_word_embeddings to false in config.json if the two were trained apart",
            )
        return
    raise WeightsError(
        where,
        f"shape {source.shapes()[name]}",
        "is a tensor that the architecture has, by its configuration",
        "check model_type and the biases in config.json; a model with further layers is not supported",
    )


def _equal(source: TensorSource, one: str, other: str) -> bool:
    shapes = source.shapes()
    if shapes[one] != shapes[other]:
        return False
    blocks = row_blocks(shapes[one], 4)
    return all(torch.equal(source.rows(one, *b).float(), source.rows(other, *b).float()) for b in blocks)
