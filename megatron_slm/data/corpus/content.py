"""What a corpus holds, as a checksum whose cost does not grow with the corpus."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path

WHOLE_UP_TO_BYTES = 256 << 20
"""A `.bin` up to this size is read whole, a larger one in blocks that add up to it."""

_BLOCK_BYTES = 1 << 20


def content_sha256(corpus: IndexedCorpus) -> str:
    """SHA-256 over a corpus' token dtype, size and tokens, hexadecimal.

    Of a `.bin` above `WHOLE_UP_TO_BYTES`, evenly spread blocks are read, the first and the last among them. A
    change between them is not seen here; stored scores carry a checksum of every sample's tokens besides.
    """
    path = bin_path(corpus.prefix)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{corpus.dtype.str} {size}".encode())
    if size <= WHOLE_UP_TO_BYTES:
        starts = np.arange(0, size, _BLOCK_BYTES)
    else:
        starts = np.linspace(0, size - _BLOCK_BYTES, WHOLE_UP_TO_BYTES // _BLOCK_BYTES).astype(np.int64)
    with path.open("rb") as file:
        for start in starts.tolist():
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
