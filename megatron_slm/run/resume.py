"""Which checkpoint a run goes on from: found, verified, and the same on every rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_slm.checkpoint.format import (
    CHECKSUM_LIMIT_BYTES,
    MANIFEST,
    Manifest,
    checkpoint_folders,
    complete_checkpoints,
    step_of,
    verify_files,
)
from megatron_slm.config import RunConfig
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.collectives import broadcast_from_rank_0, raise_on_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The checkpoint that a run goes on from."""

    folder: Path
    manifest: Manifest
    damaged: tuple[Path, ...] = ()
    """Newer ones that were passed over."""


def open_resume(config: RunConfig) -> Resume | None:
    """Find and verify what `--load` names. Collective over the world, where there is one.

    Every rank compares the checksums of its share of the files.

    Returns:
        None where `--load` is not given, or is the folder that the run saves to and holds no checkpoint yet.

    Raises:
        CheckpointError: there is none, it is damaged, or the run has nothing left to do.
    """
    if config.checkpoint.load is None:
        return None
    candidates: list[Path] = []
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with raise_on_all_ranks():
        if rank == 0:
            candidates = _candidates(config)
    candidates = broadcast_from_rank_0(candidates)
    for number, folder in enumerate(candidates):
        before = candidates[number + 1] if number + 1 < len(candidates) else None
        try:
            with raise_on_all_ranks():
                manifest = _verified(folder, config.checkpoint.load_checksums, (rank, num_ranks))
        except CheckpointError as error:
            if before is None or not config.checkpoint.load_fallback:
                raise _damaged(error, before) from error
            logger.warning("%s; --load-fallback takes %s instead", error, before.name)
        else:
            _check_length(config, manifest)
            return Resume(folder=folder, manifest=manifest, damaged=tuple(candidates[:number]))
    return None


def num_run_samples(config: RunConfig, resume: Resume | None, global_batch_size: int) -> int:
    """Samples that a run has drawn at its end, those before its checkpoint included."""
    step, consumed = (resume.manifest.step, resume.manifest.consumed_samples) if resume else (0, 0)
    return consumed + (config.training.train_iters - step) * global_batch_size


def saves_where_it_loads(config: RunConfig) -> bool:
    """Whether `--load` names the folder that the run saves to: one command that starts and resumes."""
    load = config.checkpoint.load
    return config.checkpoint.enabled and load is not None and _same(Path(load), Path(config.save_folder))


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _candidates(config: RunConfig) -> list[Path]:
    """The checkpoints to try, newest first."""
    path = Path(str(config.checkpoint.load))
    if (path / MANIFEST).exists() or (step_of(path) is not None and path.is_dir()):
        return [path]
    found = complete_checkpoints(path)[::-1]
    for other in checkpoint_folders(path):
        if other not in found and (not found or (step_of(other) or 0) > (step_of(found[0]) or 0)):
            logger.warning("%s has no %s, so it is not complete: passed over", other, MANIFEST)
    if found:
        return found
    if not saves_where_it_loads(config) or config.checkpoint.exit_on_missing_checkpoint:
        raise CheckpointError(
            "--load",
            str(path),
            "holds a complete checkpoint (a step_... folder with a manifest.json)",
            "check the path; to start afresh leave --load out, or let it name the folder that the run saves to"
            + " without --exit-on-missing-checkpoint" * config.checkpoint.exit_on_missing_checkpoint,
        )
    logger.warning("--load %s holds no checkpoint yet: the run starts afresh", path)
    return []


def _verified(folder: Path, checksums: str, share: tuple[int, int]) -> Manifest:
    manifest = Manifest.read(folder)
    limit = float("inf") if checksums == "all" else CHECKSUM_LIMIT_BYTES
    verify_files(folder, manifest, checksums=checksums != "none", limit_bytes=limit, share=share)
    return manifest


def _damaged(error: CheckpointError, before: Path | None) -> CheckpointError:
    """The error with the way round it, where there is one."""
    if before is None:
        return error
    fix = f"name another one with --load, or add --load-fallback (the one before is {before.name})"
    return CheckpointError(error.field, error.value, error.rule, fix)


def _check_length(config: RunConfig, manifest: Manifest) -> None:
    last = config.training.train_iters
    if manifest.step == last and saves_where_it_loads(config):
        logger.info("the run is complete: its checkpoint of step %d is the last of --train-iters", last)
    elif manifest.step >= last:
        raise CheckpointError(
            "--train-iters",
            last,
            f"is beyond the checkpoint's step {manifest.step}",
            "raise --train-iters, or load an earlier checkpoint",
        )
