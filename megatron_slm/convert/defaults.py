"""Defaults of conversions and comparisons; imports nothing, so that `--help` is quick."""

from __future__ import annotations

SHARD_BYTES = 4 * 2**30
"""Largest size of a weights file before the next one is started."""
TOLERANCE_NATS = 1e-4
"""Largest accepted difference of a log-probability, both sides in fp32."""
NUM_TOKENS = 512
"""Random tokens that `verify` compares on."""
DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Data types that weights may be stored in: fp32 holds all their values exactly."""
