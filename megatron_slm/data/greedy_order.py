"""Compiles and calls `greedy_order.c`, the order of a blend's samples at a cost that hardly grows with its corpora."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-ffinite-math-only", "-fno-signed-zeros", "-shared", "-fPIC")


def compiled_order(
    weights: npt.NDArray[np.float64], size: int, *, counted_every: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]] | None:
    """Apply the greedy rule (see `interleave.greedy_choices`); None without a C compiler.

    Args:
        weights: positive, fp64 [m].
        counted_every: samples in a block.

    Returns:
        the corpus of every sample, uint16 [size], and the number of samples of each corpus before every block, int64
        [size / counted_every + 1, m].
    """
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    choice = np.empty(size, dtype=np.uint16)
    counts = np.empty((size // counted_every + 1, len(weights)), dtype=np.int64)
    try:
        with _compiled() as library:
            failed = library.greedy_order(
                ctypes.c_int32(len(weights)), _address(weights), ctypes.c_int64(size), ctypes.c_int64(counted_every),
                _address(choice), _address(counts),
            )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        logger.warning("no C compiler for the order of the blend (%s): taking the slow way", output.strip()[:200])
        return None
    if failed:
        raise MemoryError(f"no memory for the order of {len(weights)} corpora")
    return choice, counts


@contextmanager
def _compiled() -> Iterator[ctypes.CDLL]:
    """Compile the library for this machine, which takes a second; one process does it once for an index."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "greedy_order.so"
        command = [os.environ.get("CC", "cc"), *_FLAGS, str(_SOURCE), "-o", str(library), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        yield ctypes.CDLL(str(library))


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
