"""Which files a run reads, and a fingerprint of each as this node sees it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import megatron_slm
from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.run.data_paths import corpus_prefixes

_CORPUS = (".idx", ".bin", ".meta.json", "_loss_mask.idx", "_loss_mask.bin")
_BLOCK = 1 << 20
_MOST_BLOCKS = 32
"""Of a larger file this many evenly spread blocks are read, the first and the last among them."""
_MOST_FILES = 1000


def read_files(config: RunConfig) -> dict[str, list[Path]]:
    """The local files and folders that a run reads, by the flag that names them. Addresses (s3://...) are left out."""
    data, model, selection = config.data, config.model, config.selection
    prefixes: list[str] = []
    with suppress(ConfigError):  # a file that names them is not here, which is found below
        prefixes = [prefix for prefix in corpus_prefixes(data) if "://" not in prefix]
    named: dict[str, list[str | None]] = {
        "--deepspeed-config": [config.parallel.deepspeed_config],
        "--data-args-path": [data.data_args_path],
        "--per-split-data-args-path": [data.per_split_data_args_path],
        "--tokenizer-model": [data.tokenizer_model],
        "--init-from": [model.init_from],
        "--reference-load": [selection.reference_load],
        "--reference-scores": [*selection.reference_scores],
        "--load": [config.checkpoint.load],
    }
    found = {flag: [Path(path) for path in paths if path] for flag, paths in named.items()}
    found["corpus"] = [Path(prefix + end) for prefix in prefixes for end in _CORPUS]
    return {flag: paths for flag, paths in found.items() if paths}


def fingerprints(config: RunConfig) -> dict[str, str | None]:
    """By `flag path`: a checksum of what lies there on this node, None where there is nothing."""
    found = {}
    for flag, paths in read_files(config).items():
        for path in paths:
            found[f"{flag} {path}"] = fingerprint(path)
    return found


def fingerprint(path: Path) -> str | None:
    """Checksum of a file or folder by names, sizes and sampled content; None where there is none, or no right to it."""
    try:
        if path.is_file():
            return _of_file(path)
        if not path.is_dir():
            return None
        try:
            folder = find_checkpoint(path)  # of a folder of checkpoints, the one that would be read
        except CheckpointError:
            folder = path
        files = sorted(file for file in folder.rglob("*") if file.is_file())[:_MOST_FILES]
        parts = [f"{file.relative_to(path)} {_of_file(file, most_blocks=2)}" for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    except OSError:
        return None


def source_fingerprint() -> str:
    """Checksum of this package's own source files: two nodes may run other checkouts of one version."""
    root = Path(megatron_slm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _of_file(path: Path, *, most_blocks: int = _MOST_BLOCKS) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _BLOCK)
    count = min(most_blocks, size // _BLOCK + 1)
    starts = [last * i // max(1, count - 1) for i in range(count)] if size > most_blocks * _BLOCK else None
    with path.open("rb") as file:
        if starts is None:
            digest.update(file.read())
        else:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
