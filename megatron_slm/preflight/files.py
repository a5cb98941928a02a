"""Fingerprints of the files that a run reads, as seen from this node."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import megatron_slm
from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.hub import Part, cached_folder, is_hub_name
from megatron_slm.run.data_paths import named_corpora

_CORPUS = (".idx", ".bin", ".meta.json", "_loss_mask.idx", "_loss_mask.bin")
_BLOCK = 1 << 20
_MAX_BLOCKS = 32
"""Number of evenly spaced blocks read from a larger file, the first and last included."""
_MAX_FILES = 1000


def read_files(config: RunConfig) -> dict[str, list[Path]]:
    """Return the local files and folders that a run reads, by flag; URLs (s3://...) are left out.

    A name of the hub is its folder in this node's cache, or a path that does not exist.
    """
    data, model, selection = config.data, config.model, config.selection
    prefixes: list[str] = []
    with suppress(ConfigError):  # the file that lists them is missing, which its own fingerprint shows
        prefixes = [corpus.prefix for corpus in named_corpora(data) if "://" not in corpus.prefix]
    named: dict[str, list[str | None]] = {
        "--deepspeed-config": [config.parallel.deepspeed_config],
        "--data-args-path": [data.data_args_path],
        "--per-split-data-args-path": [data.per_split_data_args_path],
        "--tokenizer-model": [data.tokenizer_model],
        "--init-from": [model.init_from],
        "--reference-load": [config.reference_path],
        "--reference-base": [config.reference_base_path],
        "--reference-scores": [*selection.reference_scores],
        "--load": [config.checkpoint.load],
    }
    found = {flag: [_local(path, flag) for path in paths if path] for flag, paths in named.items()}
    found["corpus"] = [Path(prefix + end) for prefix in prefixes for end in _CORPUS]
    return {flag: paths for flag, paths in found.items() if paths}


def _local(path: str, flag: str) -> Path:
    part: Part = "tokenizer" if flag == "--tokenizer-model" else "model"
    return cached_folder(path, part=part) or Path(path) if is_hub_name(path) else Path(path)


def fingerprints(config: RunConfig) -> dict[str, str | None]:
    """Return the checksum of each file and folder by `flag path`; None if it is missing on this node."""
    found = {}
    for flag, paths in read_files(config).items():
        for path in paths:
            found[f"{flag} {path}"] = fingerprint(path)
    return found


def fingerprint(path: Path) -> str | None:
    """Return the checksum of names, sizes and sampled content; None if the path is missing or unreadable."""
    try:
        if path.is_file():
            return _of_file(path)
        if not path.is_dir():
            return None
        try:
            folder = find_checkpoint(path)  # in a folder of checkpoints, the one that would be loaded
        except CheckpointError:
            folder = path
        files = sorted(file for file in folder.rglob("*") if file.is_file())[:_MAX_FILES]
        parts = [f"{file.relative_to(path)} {_of_file(file, max_blocks=2)}" for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    except OSError:
        return None


def source_fingerprint() -> str:
    """Return the checksum of this package's source files: nodes may run different checkouts of one version."""
    root = Path(megatron_slm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _of_file(path: Path, *, max_blocks: int = _MAX_BLOCKS) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= max_blocks * _BLOCK:
            digest.update(file.read())
        else:
            for i in range(max_blocks):
                file.seek((size - _BLOCK) * i // (max_blocks - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
