"""Checksum of a corpus, at a cost that is bounded for corpora of any size."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path

WHOLE_UP_TO_BYTES = 256 << 20
"""A `.bin` up to this size is read whole, a larger one in blocks that add up to this size."""

_BLOCK_BYTES = 1 << 20


def content_sha256(corpus: IndexedCorpus) -> str:
    """Return the SHA-256 of a corpus's token dtype, size and tokens, hexadecimal.

    A `.bin` above `WHOLE_UP_TO_BYTES` is sampled in evenly spaced blocks, the first and the last included. A change
    between them goes unnoticed here; stored scores also carry a checksum of every sample's tokens.
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
