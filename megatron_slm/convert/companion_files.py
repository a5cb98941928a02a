"""Files that accompany a model's weights: tokenizer, configurations, license; copied byte for byte.

A checkpoint holds them in `tokenizer/` and `origin/`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_slm.convert.hf_config import CONFIG

ORIGIN_FILES = (CONFIG, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER, ORIGIN = "tokenizer", "origin"
"""Folders of a checkpoint."""
ORIGIN_RECORD = "origin.json"
"""In `origin/`: the initial weights, references and corpora of a trained model (see `run/origin.py`)."""


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a folder that match one of the patterns; creates `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        shutil.copy2(path, target / path.name)


def tokenizer_folder(folder: Path) -> Path | None:
    """Return the folder if transformers finds a tokenizer in it, else None."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).exists() for name in names) else None
