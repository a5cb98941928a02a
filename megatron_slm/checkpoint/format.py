"""The layout of a checkpoint folder: its files, its manifest, and the search for complete ones.

    SAVE/step_00000100/
        manifest.json              size and sha256 of every file, the run's state, architecture, layout, versions
        config.yaml                the run's resolved configuration
        weights_00003.safetensors  the fp32 weights owned by rank 3, by logical tensor, and its random states
        optimizer_00003.safetensors  Adam's moments of the same
        probe.safetensors          tokens kept by the last probe of the selection, where there was one
        tokenizer/                 the tokenizer, as transformers loads it
        origin/                    the model's original config.json and license, and origin.json: the run's initial
                                   weights, corpora and references
    SAVE/latest                    name of the newest checkpoint
    SAVE/evaluations.json          held-out losses at the steps of the checkpoints

Format 2 had the random states in files of their own, rng_00003.safetensors, and its manifest does not list what is in a
file of weights; it is still read.

A folder is written under a temporary name and renamed once its manifest is there, so a folder with its final
name is complete, whatever `latest` holds. It is deleted under a temporary name too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.state import RunState
from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import CheckpointError
from megatron_slm.files import file_sha256, write_durably

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
CHECKSUM_LIMIT_BYTES = 256 * 2**20
"""Largest file whose checksum is compared on loading by default; of larger ones only the size is."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The index of a checkpoint; the last file written into it."""

    state: RunState
    """Progress of the run at the save; in the file its fields are top-level keys, beside the manifest's own."""
    architecture: Architecture
    layout: dict[str, int]
    """Sizes `pipeline`, `data` and `tensor`, and `zero_stage` where an optimizer was saved."""
    tokenizer_fingerprint: str | None
    sample_order: str | None
    """Fingerprint of the order of the training samples; None in imported models."""
    files: dict[str, dict[str, Any]]
    """`size` in bytes and `sha256` of every other file; for safetensors files also those of the `header`, for files of
    weights also the `pieces` in them (`snapshot.describe`)."""
    data: dict[str, Any] = field(default_factory=dict)
    """Read positions in the corpora (`BlendedSamples.state`); empty in imported models."""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, with a checksum of its own; durable on return."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "state"}
        content = {**self.state.to_json(), **own, "architecture": self.architecture.to_dict()}
        content["manifest_sha256"] = _content_sha256(content)
        write_durably(folder / MANIFEST, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointError: it is missing, damaged, or of another format version.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            written, version = raw.pop("manifest_sha256", None), raw["format_version"]
            damaged = written is not None and written != _content_sha256(raw)
            if version in READABLE_VERSIONS and written is not None and not damaged:
                state, arch = RunState.take_from(raw), Architecture(**raw.pop("architecture"))
                return cls(state=state, architecture=arch, **raw)
        except FileNotFoundError as error:
            raise CheckpointError(
                "checkpoint",
                str(folder),
                f"contain a {MANIFEST} (written last: without it the save was cut off)",
                "load another one",
            ) from error
        except OSError as error:
            raise CheckpointError(
                "checkpoint", str(path), f"be readable ({error.strerror})", "check its permissions and disk"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("checkpoint", str(path), f"be valid JSON ({error})", "load another one") from error
        if damaged or version in READABLE_VERSIONS:
            raise CheckpointError("checkpoint", str(path), "match its own checksum", "load another one")
        raise CheckpointError(
            "checkpoint format",
            version,
            f"be one of {READABLE_VERSIONS} for this version of megatron_slm",
            "load it with the version that saved it",
        )

    @property
    def step(self) -> int:
        """Finished steps at the save."""
        return self.state.step

    def describe_layout(self) -> str:
        """Describe the layout of the run that saved it."""
        axes = ("pipeline", "data", "context", "tensor")
        sizes = [f"{name} {self.layout[name]}" for name in axes if name in self.layout]
        layout = " x ".join(sizes)
        return f"{layout}, ZeRO-{self.layout['zero_stage']}" if "zero_stage" in self.layout else layout

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry["size"] for entry in self.files.values())


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Parse the step from the name of a checkpoint folder; None for other names."""
    found = re.fullmatch(r"step_(\d+)", folder.name)
    return int(found[1]) if found else None


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    checksums: bool = True,
    limit_bytes: float = CHECKSUM_LIMIT_BYTES,
    share: tuple[int, int] = (0, 1),
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        checksums: also compare contents, of files up to `limit_bytes`.
        share: (i, n) compares the i-th of n shares of the files, so that n ranks together compare all of them and each
            opens no more for there being many.
        on_bytes: called with the size of each block of content, to show progress.

    Raises:
        CheckpointError: a file is missing or has another size or checksum, or a safetensors file is not listed.
    """
    number, num_shares = share
    for name, entry in list(manifest.files.items())[number::num_shares]:
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["size"]:
            raise CheckpointError(
                str(path),
                None if size < 0 else f"{size} bytes",
                f"be {entry['size']} bytes long",
                "load another checkpoint",
            )
        if "header" in entry:
            _compare_checksum(path, entry["header"]["sha256"], entry["header"]["size"])
    for path in sorted(folder.glob("*.safetensors")) if number == 0 else ():
        if path.name not in manifest.files:
            raise CheckpointError(str(path), "not listed", f"be listed in {MANIFEST}", "remove it if you put it there")
    if checksums:
        largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name]["size"], name))
        small = [name for name in largest_first if manifest.files[name]["size"] <= limit_bytes]
        for name in small[number::num_shares]:
            _compare_checksum(folder / name, manifest.files[name]["sha256"], on_bytes=on_bytes)


def _compare_checksum(
    path: Path, expected: str, num_bytes: int | None = None, *, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    try:
        same = file_sha256(path, num_bytes, on_bytes=on_bytes) == expected
    except OSError as error:
        raise CheckpointError(
            str(path), "unreadable", f"be readable ({error.strerror})", "check its permissions and disk"
        ) from error
    if not same:
        raise CheckpointError(str(path), "damaged", f"match its checksum in {MANIFEST}", "load another checkpoint")


def checkpoint_folders(folder: Path) -> list[Path]:
    """List the folders with a checkpoint's name, oldest step first, complete or not."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    return sorted((p for p in inside if step_of(p) is not None and p.is_dir()), key=lambda p: (step_of(p) or 0, p.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest step first."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint at `path`, or the newest complete one inside.

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
            "contain a complete checkpoint (a step_... folder with a manifest.json)",
            "check the path, or leave --load out to start a new run",
        )
    return found[-1]


def file_entry(path: Path) -> dict[str, Any]:
    """Describe a file for the manifest."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def versions() -> Mapping[str, str]:
    """Versions of the packages that determine a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megatron_slm", "torch", "deepspeed")}
