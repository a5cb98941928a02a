"""Safetensors files written piece by piece: a tensor is never whole in memory, nor is a file.

The format (github.com/huggingface/safetensors): the length of a JSON header in 8 bytes, the header with each tensor's
dtype, shape and place, then the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.convert.hf_source import SAFETENSORS

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What it takes in a file."""
        return prod(self.shape) * self.dtype.itemsize


Blocks = Callable[[Entry], Iterable[Tensor]]
"""The tensors that, flattened and one after another, are the entry's values, in its dtype."""


def write_safetensors(
    path: Path, entries: Sequence[Entry], blocks: Blocks, metadata: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Write one file; it is on the disk when this returns.

    Returns:
        the file's name, with its size and sha256, as checkpoints list it.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that each begins at a multiple of its own
    for entry in ordered:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for content in _contents(len(text).to_bytes(8, "little") + text, ordered, blocks):
                file.write(content)
                digest.update(content)
                size += len(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a write's error names no file
        raise
    assert size == 8 + len(text) + offset, "the blocks are the entries, whole"
    return {path.name: {"size": size, "sha256": digest.hexdigest()}}


def _contents(header: bytes, entries: Sequence[Entry], blocks: Blocks) -> Iterator[bytes | memoryview]:
    yield header
    for entry in entries:
        for block in blocks(entry):
            assert block.dtype == entry.dtype, f"{entry.name} is to be written in {entry.dtype}"
            yield block.contiguous().view(-1).view(torch.uint8).numpy().data


def plan_shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cut a model into files of at most `shard_bytes`, in order; a larger tensor has a file to itself."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_shards(folder: Path, entries: Sequence[Entry], blocks: Blocks, *, shard_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index, as transformers names them."""
    shards = plan_shards(entries, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SAFETENSORS
        write_safetensors(folder / name, shard, blocks, {"format": "pt"})
        weight_map.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        total = {
            "total_parameters": sum(prod(entry.shape) for entry in entries),
            "total_size": sum(entry.num_bytes for entry in entries),
        }
        index = {"metadata": total, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2))
