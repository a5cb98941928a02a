"""Models of `--init-from` and `--reference-load`: a Hugging Face folder, a name of the hub, or a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest, find_checkpoint, verify_files
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.companion_files import ORIGIN, TOKENIZER, tokenizer_folder
from megatron_slm.convert.hf_config import is_hf_folder, model_folder, read_architecture
from megatron_slm.convert.stored_names import LogicalWeights
from megatron_slm.errors import CheckpointError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on disk: architecture, weights and companion files."""

    architecture: Architecture
    source: LogicalWeights | CheckpointSource
    tokenizer_folder: Path | None
    """Folder of the tokenizer; None without one."""
    origin_folder: Path | None
    """Folder of the original config.json and other companion files; None for a model trained from scratch."""

    def content_sha256(self) -> str:
        """Return the SHA-256 over architecture and weights; for a Hugging Face folder this reads every file."""
        parts = [json.dumps(self.architecture.to_dict(), sort_keys=True), self.source.content_sha256()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def open_model(path: str, *, field: str, checksums: bool = True, share: tuple[int, int] = (0, 1)) -> Model:
    """Open a model of either kind.

    Args:
        path: a folder, or a name of the Hugging Face hub.
        field: the flag that names it, for errors.
        checksums: verify a checkpoint's files by checksum, not by size alone.
        share: (i, n) verifies the i-th of n shares of a checkpoint's files.

    Raises:
        WeightsError, CheckpointError: the folder is neither, or incomplete.
    """
    folder = model_folder(path, field=field)
    if is_hf_folder(folder):
        architecture = read_architecture(folder)
        return Model(
            architecture=architecture,
            source=LogicalWeights.of_folder(folder, architecture),
            tokenizer_folder=tokenizer_folder(folder),
            origin_folder=folder,
        )
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        raise WeightsError(
            field,
            path,
            "be a Hugging Face folder (with a config.json) or hold a complete checkpoint",
            "check the path",
        ) from error
    manifest = Manifest.read(checkpoint)
    verify_files(checkpoint, manifest, checksums=checksums, share=share)
    return Model(
        architecture=manifest.architecture,
        source=CheckpointSource(checkpoint, manifest),
        tokenizer_folder=tokenizer_folder(checkpoint / TOKENIZER),
        origin_folder=checkpoint / ORIGIN if (checkpoint / ORIGIN).is_dir() else None,
    )
