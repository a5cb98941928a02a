"""Writes safetensors files and their checksums in one pass, block by block.

Unlike the library's `save_file`, it does not need whole tensors in memory or a second read for the checksum, creates
files with the usual permissions, and raises disk errors with their error numbers.

The format (github.com/huggingface/safetensors): the length of a JSON header in 8 bytes, the header with each tensor's
dtype, shape and place, then the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data in a file."""
        return prod(self.shape) * self.dtype.itemsize


Blocks = Callable[[Entry], Iterable[Tensor]]
"""Yields tensors in the entry's dtype, on any device; flattened and concatenated they are its values."""


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write whole tensors (see `write_entries`)."""
    entries = [Entry(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()]
    return write_entries(path, entries, lambda entry: (tensors[entry.name],), metadata)


def write_entries(path: Path, entries: Sequence[Entry], blocks: Blocks, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file; durable on return.

    Returns:
        the file's entry in a manifest: `size` in bytes and `sha256`, and the same of its header under `header`.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = sorted(
        entries, key=lambda entry: -entry.dtype.itemsize
    )  # so that each starts at a multiple of its itemsize
    header, digest = _header(ordered, metadata), hashlib.sha256()
    try:
        with path.open("wb") as file:
            for content in _contents(header, ordered, blocks):
                for begin in range(0, len(content), _BLOCK_BYTES):  # hashed while it is in the cache
                    file.write(content[begin : begin + _BLOCK_BYTES])
                    digest.update(content[begin : begin + _BLOCK_BYTES])
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except OSError as error:
        error.filename = error.filename or str(path)  # a write's error names no file
        raise
    assert size == len(header) + sum(entry.num_bytes for entry in entries), "the blocks are the entries, whole"
    return {
        "size": size,
        "sha256": digest.hexdigest(),
        "header": {"size": len(header), "sha256": hashlib.sha256(header).hexdigest()},
    }


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> memoryview:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        described[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _contents(header: memoryview, entries: Sequence[Entry], blocks: Blocks) -> Iterator[memoryview]:
    yield header
    for entry in entries:
        for block in blocks(entry):
            assert block.dtype == entry.dtype, f"{entry.name} is to be written in {entry.dtype}"
            yield block.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
