"""What travels with the weights of a Hugging Face folder: its tokenizer, configurations and licence, byte for byte.

In one of our checkpoints they lie in `tokenizer/` and `origin/`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_slm.convert.hf_config import CONFIG

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What transformers' tokenizers of these families are made of."""
ORIGIN_FILES = (CONFIG, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER, ORIGIN = "tokenizer", "origin"
"""Folders in a checkpoint."""
STORY = "origin.json"
"""In `origin/`: where a trained model comes from (see `run/origin.py`)."""


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy those of a folder's files that match, into a folder that is made."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        shutil.copy2(path, target / path.name)


def tokenizer_folder(folder: Path) -> Path | None:
    """The folder, if transformers finds a tokenizer in it."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).exists() for name in names) else None
