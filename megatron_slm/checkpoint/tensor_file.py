"""Writing a safetensors file in one pass: to the disk, and through a checksum, tensor by tensor.

The library's `save_file` would do, but for three things: the checksum would need every file read again; its files are
readable by their owner only; and what the disk says of a failure would be words instead of an error number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
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


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write 1-D or larger tensors, of any device, as a safetensors file that is on the disk when this returns.

    Returns:
        the file's line in a manifest: `size` in bytes and `sha256`, and the same of its header under `header`.

    Raises:
        OSError: it cannot be written.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so that each is aligned
    header, digest = _header(tensors, order, metadata), hashlib.sha256()
    try:
        with path.open("wb") as file:
            for block in itertools.chain([header], map(_bytes, (tensors[name] for name in order))):
                for begin in range(0, len(block), _BLOCK_BYTES):  # hashed while it is in the cache
                    file.write(block[begin : begin + _BLOCK_BYTES])
                    digest.update(block[begin : begin + _BLOCK_BYTES])
            file.flush()
            os.fsync(file.fileno())
            return {
                "size": file.tell(),
                "sha256": digest.hexdigest(),
                "header": {"size": len(header), "sha256": hashlib.sha256(header).hexdigest()},
            }
    except OSError as error:
        error.filename = error.filename or str(path)  # a write's error names no file
        raise


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> memoryview:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        described[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
