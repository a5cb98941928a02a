"""The most bytes of tensors alive at once (tools/benchmarks/tensor_bytes.py)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks.tensor_bytes import Peak

__all__ = ["Peak"]
