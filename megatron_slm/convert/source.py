"""What `--init-from` and `--reference-load` may name: a Hugging Face folder or one of our checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest, find_checkpoint, verify_files
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.carried import ORIGIN, TOKENIZER, tokenizer_folder
from megatron_slm.convert.hf_config import is_hf_folder, read_architecture
from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.errors import CheckpointError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on disk: its shape, its weights, and what travels with them."""

    architecture: Architecture
    source: HuggingFaceSource | CheckpointSource
    tokenizer_folder: Path | None
    """Where its tokenizer is, if it has one."""
    origin_folder: Path | None
    """Where the config.json it once came with is, and what else travels (see `carried`); None if it was born here."""

    def content_sha256(self) -> str:
        """SHA-256 over architecture and weights; of a Hugging Face folder it reads every file whole."""
        parts = [json.dumps(asdict(self.architecture), sort_keys=True), self.source.content_sha256()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def open_model(path: str, *, field: str, checksums: bool = True) -> Model:
    """Open a model folder of either kind.

    Args:
        field: the flag that named it, for errors.
        checksums: compare a checkpoint's contents with its manifest, not its files' sizes alone.

    Raises:
        WeightsError, CheckpointError: it is neither, or not whole.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise WeightsError(field, path, "is a folder", "check the path")
    if is_hf_folder(folder):
        return Model(
            architecture=read_architecture(folder),
            source=HuggingFaceSource(folder),
            tokenizer_folder=tokenizer_folder(folder),
            origin_folder=folder,
        )
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        raise WeightsError(
            field,
            path,
            "is a Hugging Face folder (with a config.json) or holds a complete checkpoint of ours",
            "check the path",
        ) from error
    manifest = Manifest.read(checkpoint)
    verify_files(checkpoint, manifest, checksums=checksums)
    return Model(
        architecture=manifest.architecture,
        source=CheckpointSource(checkpoint),
        tokenizer_folder=tokenizer_folder(checkpoint / TOKENIZER),
        origin_folder=checkpoint / ORIGIN if (checkpoint / ORIGIN).is_dir() else None,
    )
