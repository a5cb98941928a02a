"""The folder of a checkpoint: its files, its manifest, and how one is found that is complete.

    SAVE/step_00000100/
        manifest.json              every file's size and sha256, step, samples consumed, architecture, layout, versions
        config.yaml                the run's resolved configuration
        weights_00003.safetensors  the fp32 weights that rank 3 owns, by logical tensor
        optimizer_00003.safetensors  Adam's moments of the same
        rng_00003.safetensors      the rank's random state
        probe.safetensors          which tokens the last probe of the selection kept, where there was one
        tokenizer/                 the tokenizer, as transformers loads it
        origin/                    the config.json that the model once came with, its licence, and origin.json: the
                                   start, the corpora and the reference of the run
    SAVE/latest                    name of the newest
    SAVE/evaluations.json          held-out losses at the steps of the checkpoints

A folder is written under a temporary name and renamed once its manifest is there, so a folder with its final
name is complete, whatever `latest` says. It is deleted under a temporary name too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import CheckpointError
from megatron_slm.files import file_sha256, write_durably

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
CHECKSUM_LIMIT_BYTES = 256 * 2**20
"""Files up to this size have their checksum compared on loading, larger ones their size only (unless asked for)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is; the last file written into it."""

    step: int
    consumed_samples: int
    adam_step: int
    """Optimizer steps that were applied (steps less those skipped)."""
    architecture: Architecture
    layout: dict[str, int]
    """Sizes `pipeline`, `data` and `tensor`, and `zero_stage` where an optimizer was saved."""
    tokenizer_fingerprint: str | None
    sample_order: str | None
    """Fingerprint of the order in which the corpus is read; None where no data was read (an imported model)."""
    files: dict[str, dict[str, Any]]
    """`size` in bytes and `sha256` of every other file; of one that holds tensors also those of its `header`."""
    score_threshold: float | None = None
    """The running threshold of a selection by quantile; None where there is none."""
    tokens_seen: int | None = 0
    """Valid tokens of all steps so far; None in checkpoints of runs that did not count them."""
    tokens_kept: int | None = 0
    """How many of them were trained on."""
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps, in nats, that loss spikes are told by; empty where they are not looked for."""
    row_shares: list[int] = field(default_factory=list)
    """Sixteenths of the rows of each block's backward pass; empty where nothing controls them."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the run stood in each of its corpora (`BlendedSamples.state`); empty where no data was read."""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write it into `folder`, with a checksum of its own, reaching the disk before it returns."""
        content = asdict(self)
        content["manifest_sha256"] = _content_sha256(content)
        write_durably(folder / MANIFEST, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointError: it is missing, damaged, or of a format this version does not know.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            written, version = raw.pop("manifest_sha256", None), raw["format_version"]
            damaged = written is not None and written != _content_sha256(raw)
            if version == FORMAT_VERSION and written is not None and not damaged:
                return cls(**{**raw, "architecture": Architecture(**raw["architecture"])})
        except FileNotFoundError as error:
            raise CheckpointError(
                "checkpoint",
                str(folder),
                f"holds a {MANIFEST} (written last, so without it the save never ended)",
                "load another one",
            ) from error
        except OSError as error:
            raise CheckpointError("checkpoint", str(path), f"can be read ({error.strerror})", "see to it") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("checkpoint", str(path), f"is readable JSON ({error})", "load another one") from error
        if damaged or version == FORMAT_VERSION:
            raise CheckpointError(
                "checkpoint", str(path), "has the content it was written with, by its own checksum", "load another one"
            )
        raise CheckpointError(
            "checkpoint format",
            version,
            f"is {FORMAT_VERSION} in this version of megatron_slm",
            "load it with the version that wrote it",
        )

    def describe_layout(self) -> str:
        """The layout it was saved at, in words."""
        sizes = [f"{name} {self.layout[name]}" for name in ("pipeline", "data", "tensor") if name in self.layout]
        stage = [f"ZeRO-{self.layout['zero_stage']}"] if "zero_stage" in self.layout else []
        return " x ".join(sizes) + "".join(f", {word}" for word in stage)

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(entry["size"] for entry in self.files.values())


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None where it is no checkpoint's name."""
    found = re.fullmatch(r"step_(\d+)", folder.name)
    return int(found[1]) if found else None


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    checksums: bool = True,
    limit_bytes: float = CHECKSUM_LIMIT_BYTES,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Compare every file with the manifest.

    Args:
        checksums: also compare contents, of files up to `limit_bytes`.
        share: (i, n) compares only the i-th of n shares of the contents, so that n ranks compare all of them at
            once. Names, sizes and headers are always compared.

    Raises:
        CheckpointError: a file is missing, has another size or another checksum, or holds tensors and is not listed.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["size"]:
            raise CheckpointError(
                str(path),
                "missing" if size < 0 else f"{size} bytes",
                f"is {entry['size']} bytes long",
                "load another checkpoint",
            )
        if "header" in entry:
            _compare_checksum(path, entry["header"]["sha256"], entry["header"]["size"])
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest.files:
            raise CheckpointError(str(path), "present", f"is listed in {MANIFEST}", "remove it, if you put it there")
    if checksums:
        largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name]["size"], name))
        small = [name for name in largest_first if manifest.files[name]["size"] <= limit_bytes]
        for name in small[share[0] :: share[1]]:
            _compare_checksum(folder / name, manifest.files[name]["sha256"])


def _compare_checksum(path: Path, expected: str, num_bytes: int | None = None) -> None:
    try:
        same = file_sha256(path, num_bytes) == expected
    except OSError as error:
        raise CheckpointError(str(path), "unreadable", f"can be read ({error.strerror})", "see to it") from error
    if not same:
        raise CheckpointError(str(path), "content", "has the checksum of the manifest", "load another checkpoint")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Everything in a folder that has a checkpoint's name, oldest step first, complete or not."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    return sorted((p for p in inside if step_of(p) is not None and p.is_dir()), key=lambda p: (step_of(p) or 0, p.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


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


def file_entry(path: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def versions() -> Mapping[str, str]:
    """Versions of what wrote a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megatron_slm", "torch", "deepspeed")}
