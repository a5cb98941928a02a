"""Compiles and calls `greedy_order.c`, the order of a blend's samples at a cost that hardly grows with its corpora."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-ffinite-math-only", "-fno-signed-zeros", "-shared", "-fPIC")


class GreedyOrder:
    """The corpora of a blend's samples, one after another (see `interleave.greedy_choices`).

    Args:
        weights: positive, fp64 [m], m at most 65,536.
        library: compiled `greedy_order.c`.
    """

    def __init__(self, weights: npt.NDArray[np.float64], library: ctypes.CDLL) -> None:
        self.library, self._num_corpora = library, len(weights)
        library.greedy_new.restype, library.greedy_comparisons.restype = ctypes.c_void_p, ctypes.c_int64
        weights = np.ascontiguousarray(weights, dtype=np.float64)
        self._state = ctypes.c_void_p(library.greedy_new(ctypes.c_int32(len(weights)), _address(weights)))
        if not self._state:
            raise MemoryError(f"no memory for the order of {len(weights)} corpora")

    def draw(self, num_samples: int) -> npt.NDArray[np.uint16]:
        """Return the corpora of the next samples."""
        choice = np.empty(num_samples, dtype=np.uint16)
        self.library.greedy_next(self._state, ctypes.c_int64(num_samples), _address(choice))
        return choice

    def drawn(self) -> npt.NDArray[np.int64]:
        """Return how many samples of each corpus were drawn."""
        counts = np.empty(self._num_corpora, dtype=np.int64)
        self.library.greedy_drawn(self._state, _address(counts))
        return counts

    @property
    def comparisons(self) -> int:
        """Number of values compared so far: the work, where a plain loop has corpora x samples."""
        return int(self.library.greedy_comparisons(self._state))

    def __del__(self) -> None:
        self.library.greedy_free(self._state)


def compiled_order(weights: npt.NDArray[np.float64]) -> GreedyOrder | None:
    """Begin the order of a blend; None without a C compiler.

    Compiling for this machine takes a second; one process does it once for an index.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "greedy_order.so"
            command = [os.environ.get("CC", "cc"), *_FLAGS, str(_SOURCE), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return GreedyOrder(weights, ctypes.CDLL(str(library)))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        logger.warning("no C compiler for the order of the blend (%s): taking the slow way", output.strip()[:200])
        return None


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
