"""Small texts on which tokenizers tend to differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PROSE = (
    "The ship sailed on the 3rd of June, 1851, with 27 men and a captain who feared nothing at all.",
    "Natalia sold 48 clips in April, and half as many clips in May. She sold 48/2 = 24 clips in May.",
    "  Two leading spaces,  two in the middle, and two at the end.  ",
    "A naïve café in Zürich — “quoted” … and the price: 12,345.67 €.",
)
CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "class Tree:\n\tdef __init__(self):\n\t\tself.left = None\n\n\n# ------------------------------ end\n",
    ".. note::\r\n\r\n   Windows line breaks, ``literal`` text.\r\n",
)
SCRIPTS = (
    "Привет, мир! 你好,世界。 こんにちは 한국어",
    "emoji 🙂👩‍👧 \u00a0 \u200b \u3000 \ufeff \u0000 controls \x7f",
)
EDGES = ("", " ", "      ", "\n", "\n\n \n", "x", "0000", "<0x41> <unk> ▁▁ [INST]", "-" * 99, "abab" * 30)
TEXTS = (*PROSE, *CODE, *SCRIPTS, *EDGES)


def training_texts() -> list[str]:
    """Return enough text to train a few hundred pieces."""
    return [*PROSE, *CODE, *SCRIPTS] * 5 + [f"{text} {at}" for at, text in enumerate(PROSE * 10)]


def mixtures(count: int) -> list[str]:
    """Return random mixtures of all scripts, cut anywhere between characters."""
    generator, pool = np.random.default_rng(0), "".join(TEXTS) + "🙂👩‍👧你好Привет한국어naïve"
    made = []
    for _ in range(count):
        starts = generator.integers(0, len(pool), generator.integers(1, 6))
        made.append(" ".join(pool[start : start + generator.integers(1, 60)] for start in starts))
    return made


def write_json_lines(path: Path, texts: Sequence[object], key: str = "text") -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path
