"""Finds and verifies the checkpoint that a run resumes from, the same on every rank."""

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
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.collectives import broadcast_from_rank_0
from megatron_slm.parallel.meeting import raise_on_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The checkpoint that a run resumes from."""

    folder: Path
    manifest: Manifest
    damaged: tuple[Path, ...] = ()
    """Newer checkpoints that were skipped."""


def open_resume(config: RunConfig) -> Resume | None:
    """Find and verify the checkpoint of `--load`. Collective over the world, where there is one.

    One rank reads the manifest for all; every rank verifies its share of the files.

    Returns:
        None without `--load`, and where it is the folder that the run saves to and has no checkpoint yet.

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
            manifest = _verified(folder, config.checkpoint.load_checksums, (rank, num_ranks))
        except CheckpointError as error:
            if before is None or not config.checkpoint.load_fallback:
                raise _damaged(error, before) from error
            logger.warning("%s; --load-fallback: trying %s instead", error, before.name)
        else:
            if not config.logging.eval_only:
                _check_length(config, manifest)
            return Resume(folder=folder, manifest=manifest, damaged=tuple(candidates[:number]))
    return None


def num_run_samples(config: RunConfig, resume: Resume | None, batch_sizes: BatchSizes) -> int:
    """Count the samples that a run draws until its end, those before its checkpoint included."""
    step, consumed = (resume.manifest.step, resume.manifest.state.consumed_samples) if resume else (0, 0)
    return consumed + batch_sizes.samples_of(max(0, config.training.train_iters - step), consumed)


def saves_where_it_loads(config: RunConfig) -> bool:
    """True if `--load` is the folder that the run saves to, so that one command starts and resumes."""
    load = config.checkpoint.load
    return config.checkpoint.enabled and load is not None and _same(Path(load), Path(config.save_folder))


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _candidates(config: RunConfig) -> list[Path]:
    """List the checkpoints to try, newest first."""
    path = Path(str(config.checkpoint.load))
    if (path / MANIFEST).exists() or (step_of(path) is not None and path.is_dir()):
        return [path]
    found = complete_checkpoints(path)[::-1]
    for other in checkpoint_folders(path):
        if other not in found and (not found or (step_of(other) or 0) > (step_of(found[0]) or 0)):
            logger.warning("skipping %s: incomplete, without %s", other, MANIFEST)
    if found:
        return found
    must_load = config.checkpoint.exit_on_missing_checkpoint or config.logging.eval_only
    if must_load or not saves_where_it_loads(config):
        fix = "check the path; to start a new run leave --load out, or set it to the folder that the run saves to"
        if config.checkpoint.exit_on_missing_checkpoint:
            fix += " without --exit-on-missing-checkpoint"
        rule = "contain a complete checkpoint (a step_... folder with a manifest.json)"
        raise CheckpointError("--load", str(path), rule, fix)
    logger.warning("--load %s contains no checkpoint yet: starting a new run", path)
    return []


def _verified(folder: Path, checksums: str, share: tuple[int, int]) -> Manifest:
    """Read a manifest on rank 0 and verify every rank's share of its files. Collective over the world."""
    read: Manifest | None = None
    with raise_on_all_ranks():
        if share[0] == 0:
            read = Manifest.read(folder)
    manifest = broadcast_from_rank_0(read)
    assert manifest is not None, "rank 0 read it"
    limit = float("inf") if checksums == "all" else CHECKSUM_LIMIT_BYTES
    with raise_on_all_ranks():
        verify_files(folder, manifest, checksums=checksums != "none", limit_bytes=limit, share=share)
    return manifest


def _damaged(error: CheckpointError, before: Path | None) -> CheckpointError:
    """Add the fallback to the error's fix, where there is one."""
    if before is None:
        return error
    fix = f"name another one with --load, or add --load-fallback (the one before is {before.name})"
    return error.with_fix(fix)


def _check_length(config: RunConfig, manifest: Manifest) -> None:
    last = config.training.train_iters
    if manifest.step == last and saves_where_it_loads(config):
        logger.info("the run is complete: its checkpoint is of step %d, the last of --train-iters", last)
    elif manifest.step >= last:
        raise CheckpointError(
            "--train-iters",
            last,
            f"be greater than the checkpoint's step, {manifest.step}",
            "raise --train-iters, or load an earlier checkpoint",
        )
