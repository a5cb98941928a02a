"""Retention of checkpoints: the last ones, those of every n-th step, and the best by a held-out set."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.format import complete_checkpoints, step_of
from megatron_slm.files import sync_folder, write_durably

logger = logging.getLogger(__name__)

_DELETED = ".deleted.tmp"
"""Suffix of checkpoints that are being deleted."""

EVALUATIONS = "evaluations.json"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Rules by which checkpoints are kept. Without `keep_last`, all are."""

    keep_last: int | None = None
    """Number of newest checkpoints to keep."""
    retain_interval: int | None = None
    """Keep the checkpoints of steps that this divides."""
    keep_best: str | None = None
    """Keep the checkpoint with the lowest loss of this held-out set, the newest of equals."""

    def kept(self, steps: Collection[int], losses: Mapping[int, float]) -> set[int]:
        """Return the steps whose checkpoints are kept.

        Args:
            losses: of `keep_best`'s set, by step; a step without one is not among the best.
        """
        if self.keep_last is None:
            return set(steps)
        kept = set(sorted(steps)[-self.keep_last :])
        if self.retain_interval is not None:
            kept |= {step for step in steps if step % self.retain_interval == 0}
        evaluated = [step for step in steps if step in losses]
        if self.keep_best is not None and evaluated:
            kept.add(min(evaluated, key=lambda step: (losses[step], -step)))
        return kept


def prune(folder: Path, retention: Retention) -> None:
    """Delete the checkpoints that need not be kept; called after a newer one was committed.

    A failed deletion is logged and does not stop training.
    """
    paths = {step_of(path) or 0: path for path in complete_checkpoints(folder)}
    losses = read_evaluations(folder).get(retention.keep_best, {}) if retention.keep_best else {}
    for step in sorted(set(paths) - retention.kept(paths, losses)):
        try:
            remove_checkpoint(paths[step])
        except OSError as error:
            logger.warning("cannot delete %s (%s)", paths[step], error.strerror)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint under a temporary name, so that no partial one has its name."""
    doomed = path.with_name(f".{path.name}{_DELETED}")
    if doomed.exists():  # of an earlier checkpoint of this step, whose deletion failed
        shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves and deletions left.

    A deletion that fails again (somebody reads the files on NFS) is logged.

    Raises:
        OSError: the rest of a save cannot be deleted.
    """
    for leftover in folder.glob(".step_*.tmp"):
        try:
            shutil.rmtree(leftover)
        except OSError as error:
            if not leftover.name.endswith(_DELETED):
                raise
            logger.warning("cannot delete %s yet (%s)", leftover, error.strerror)


def read_evaluations(folder: Path) -> dict[str, dict[int, float]]:
    """Read the held-out losses in nats, by set and step, that `record_evaluation` wrote; empty without a file."""
    try:
        raw = json.loads((folder / EVALUATIONS).read_bytes())
        return {name: {int(step): float(loss) for step, loss in losses.items()} for name, losses in raw.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        logger.warning("cannot read %s (%s): ignoring earlier held-out losses", folder / EVALUATIONS, error)
        return {}


def record_evaluation(
    folder: Path, step: int, losses: Mapping[str, float | None], *, pending: Collection[int] = ()
) -> None:
    """Add the losses of a step and drop those of later steps and of steps without a checkpoint.

    Args:
        pending: steps whose checkpoints are still being written.

    Raises:
        OSError: the file cannot be written.
    """
    steps = {step_of(path) for path in complete_checkpoints(folder)} | set(pending)
    found = read_evaluations(folder)
    for name, loss in losses.items():
        if loss is not None:
            found.setdefault(name, {})[step] = loss
    kept = {
        name: {str(at): loss for at, loss in sorted(of_set.items()) if at == step or (at in steps and at < step)}
        for name, of_set in found.items()
    }
    write_durably(folder / EVALUATIONS, json.dumps(kept, indent=1).encode())
