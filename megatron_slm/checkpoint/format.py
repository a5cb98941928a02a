"""The folder of a checkpoint: its files, its manifest, and how one is found that is complete.

    SAVE/step_00000100/
        manifest.json              every file's size and sha256, step, samples consumed, architecture, versions
        config.yaml                the run's resolved configuration
        weights_00003.safetensors  the fp32 weights that rank 3 owns, by logical tensor
        optimizer_00003.safetensors  Adam's moments of the same
        rng_00003.safetensors      the rank's random state
        probe.safetensors          which tokens the last probe of the selection kept, where there was one
        tokenizer/                 the tokenizer, as transformers loads it
    SAVE/latest                    name of the newest

A folder is written under a temporary name and renamed once its manifest is there, so a folder with its final
name is complete, whatever `latest` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
CHECKSUM_LIMIT_BYTES = 256 * 2**20
"""Files up to this size have their checksum compared on loading, larger ones their size only."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is; the last file written into it."""

    step: int
    consumed_samples: int
    adam_step: int
    """Optimizer steps that were applied (steps less those skipped)."""
    architecture: Architecture
    layout: dict[str, int]
    tokenizer_fingerprint: str | None
    sample_order: str | None
    """Fingerprint of the order in which the corpus is read; None where no data was read (an imported model)."""
    files: dict[str, dict[str, Any]]
    """Size in bytes and sha256 of every other file."""
    score_threshold: float | None = None
    """The running threshold of a selection by quantile; None where there is none, as in older checkpoints."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the run stood in each of its corpora (`BlendedSamples.state`); empty where no data was read, and in older
    checkpoints."""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write it into `folder`, reaching the disk before it returns."""
        write_durably(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointError: it is missing, damaged, or of a format this version does not know.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
            version = raw["format_version"]
            if version == FORMAT_VERSION:
                return cls(**{**raw, "architecture": Architecture(**raw["architecture"])})
        except FileNotFoundError as error:
            raise CheckpointError(
                "checkpoint",
                str(folder),
                f"holds a {MANIFEST} (written last, so without it the save never ended)",
                "load another one",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError("checkpoint", str(path), f"is readable JSON ({error})", "load another one") from error
        raise CheckpointError(
            "checkpoint format",
            version,
            f"is {FORMAT_VERSION} in this version of megatron_slm",
            "load it with the version that wrote it",
        )


def folder_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def verify_files(folder: Path, manifest: Manifest, *, checksums: bool = True) -> None:
    """Compare every file with the manifest.

    Args:
        checksums: also compare contents, of files up to `CHECKSUM_LIMIT_BYTES`; one rank of a run is enough.

    Raises:
        CheckpointError: a file is missing, has another size, or (up to a size limit) another checksum.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != entry["size"]:
            raise CheckpointError(
                str(path),
                "missing" if size < 0 else f"{size} bytes",
                f"is {entry['size']} bytes long",
                "load another checkpoint",
            )
        if checksums and size <= CHECKSUM_LIMIT_BYTES and file_sha256(path) != entry["sha256"]:
            raise CheckpointError(str(path), "content", "has the checksum of the manifest", "load another checkpoint")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in inside if re.fullmatch(r"step_\d+", path.name) and (path / MANIFEST).exists())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`, or the newest complete one in it.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise CheckpointError(
            "--load",
            str(path),
            "holds a complete checkpoint (a step_... folder with a manifest.json)",
            "check the path, or leave --load out to start afresh",
        )
    return found[-1]


def file_sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or absent, and on the disk, when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> Mapping[str, str]:
    """Versions of what wrote a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megatron_slm", "torch", "deepspeed")}
