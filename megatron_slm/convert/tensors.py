"""Validation of the tensors of a model on disk: names, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.checkpoint.tensor_file import Blocks, Entry
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.defaults import DTYPE_NAMES
from megatron_slm.errors import WeightsError
from megatron_slm.model.llama import EMBEDDING_NAME, OUTPUT_NAME, layer_list
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import parts_of
from megatron_slm.progress import Progress

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""Supported storage dtypes; fp32 represents all of their values exactly."""
EMBEDDING, OUTPUT = f"{EMBEDDING_NAME}.weight", f"{OUTPUT_NAME}.weight"
BLOCK_BYTES = 32 * 2**20
"""Approximate memory for copying or comparing a tensor."""


class TensorSource(Protocol):
    """Logical tensors on disk."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of every tensor by name."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) along a tensor's first dimension, and no others, in fp32 or the stored dtype."""
        ...

    def files(self) -> dict[str, str]:
        """Return the path of the file that holds each tensor, by tensor name."""
        ...


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every logical tensor of an architecture by name, in the model's order."""
    with torch.device("meta"):
        modules = [maker.make() for maker in layer_list(arch, ParallelLayers(vocabulary_divisible_by=1))]
    return {part.name: part.shape for module in modules for p in module.parameters() for part in parts_of(p)}


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor of `shape` into ranges of rows of about `BLOCK_BYTES` each."""
    step = max(1, BLOCK_BYTES // (itemsize * prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def counted(blocks: Blocks, progress: Progress) -> Blocks:
    """Return `blocks` that also count the bytes they yield as done."""

    def counting(entry: Entry) -> Iterator[Tensor]:
        for block in blocks(entry):
            yield block
            progress.advance(block.nbytes)

    return counting


def check_tensors(arch: Architecture, source: TensorSource, *, field: str) -> None:
    """Check the tensors of a model folder against its architecture.

    Ignores RoPE buffers of old folders, and a tied output weight that is a second copy of the embedding.

    Args:
        field: the flag that names the folder, for errors.

    Raises:
        WeightsError: a tensor is missing, unexpected, or of another shape or dtype; names the tensor and its file.
    """
    expected, shapes, dtypes, files = expected_tensors(arch), source.shapes(), source.dtypes(), source.files()
    for name, shape in expected.items():
        if name not in shapes:
            raise WeightsError.missing(
                f"{field}: {name}",
                f"the model's configuration, with shape {shape} ({len(shapes)} other tensors were found)",
                "use a folder whose configuration and weights belong together",
            )
        if shapes[name] != shape:
            raise WeightsError(
                f"{field}: shape of {name} in {files[name]}",
                shapes[name],
                f"be {shape}, by the model's configuration",
                "use a folder whose configuration and weights belong together",
            )
        if dtypes[name] not in DTYPES.values():
            raise WeightsError(
                f"{field}: dtype of {name} in {files[name]}",
                str(dtypes[name]).removeprefix("torch."),
                f"be one of {', '.join(DTYPES)}",
                "convert the weights to one of these first",
            )
    for name in sorted(shapes.keys() - expected.keys()):
        _check_unexpected(name, arch, source, field)


def _check_unexpected(name: str, arch: Architecture, source: TensorSource, field: str) -> None:
    file = source.files()[name]
    if name.endswith(".rotary_emb.inv_freq"):
        return
    if name == OUTPUT and arch.tied:
        if not _equal(source, OUTPUT, EMBEDDING):
            raise WeightsError(
                f"{field}: {name} in {file}",
                "a weight of its own",
                "equal the embedding, because tie_word_embeddings is true in config.json",
                "set tie_word_embeddings to false if the two were trained separately",
            )
        return
    raise WeightsError(
        f"{field}: tensor in {file}",
        name,
        "belong to the architecture of the model's configuration",
        "check model_type and the bias options in config.json; models with extra layers are not supported",
    )


def _equal(source: TensorSource, one: str, other: str) -> bool:
    shapes = source.shapes()
    if shapes[one] != shapes[other]:
        return False
    blocks = row_blocks(shapes[one], 4)
    return all(torch.equal(source.rows(one, *b).float(), source.rows(other, *b).float()) for b in blocks)
