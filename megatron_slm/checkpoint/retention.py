"""Which checkpoints of a run stay: the last ones, those of every n-th step, and the best by a held-out set."""

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
"""End of the names of checkpoints on their way out."""

EVALUATIONS = "evaluations.json"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept. Without `keep_last`, everything."""

    keep_last: int | None = None
    """This many newest ones."""
    retain_interval: int | None = None
    """Those of every step that this divides."""
    keep_best: str | None = None
    """The one with the lowest loss of this held-out set (the newest of equals)."""

    def kept(self, steps: Collection[int], losses: Mapping[int, float]) -> set[int]:
        """The steps whose checkpoints stay, of those there are.

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
    """Delete what a run need not keep; called when a newer checkpoint has been committed.

    What cannot be deleted stays, with a warning: it is no reason to stop training.
    """
    paths = {step_of(path) or 0: path for path in complete_checkpoints(folder)}
    losses = read_evaluations(folder).get(retention.keep_best, {}) if retention.keep_best else {}
    for step in sorted(set(paths) - retention.kept(paths, losses)):
        try:
            remove_checkpoint(paths[step])
        except OSError as error:
            logger.warning("%s cannot be deleted (%s)", paths[step], error.strerror)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    doomed = path.with_name(f".{path.name}{_DELETED}")
    if doomed.exists():  # of an earlier checkpoint of this step, whose deletion could not be ended
        shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Delete what saves and deletions that were killed have left.

    A deletion that cannot be ended (somebody reads the files on NFS) stays, with a warning.

    Raises:
        OSError: what a save has left cannot be deleted.
    """
    for leftover in folder.glob(".step_*.tmp"):
        try:
            shutil.rmtree(leftover)
        except OSError as error:
            if not leftover.name.endswith(_DELETED):
                raise
            logger.warning("%s cannot be deleted yet (%s)", leftover, error.strerror)


def read_evaluations(folder: Path) -> dict[str, dict[int, float]]:
    """Held-out losses in nats, by set and step, as `record_evaluation` wrote them; empty where it wrote none."""
    try:
        raw = json.loads((folder / EVALUATIONS).read_bytes())
        return {name: {int(step): float(loss) for step, loss in losses.items()} for name, losses in raw.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        logger.warning("%s cannot be read (%s): earlier losses are not known", folder / EVALUATIONS, error)
        return {}


def record_evaluation(
    folder: Path, step: int, losses: Mapping[str, float | None], *, pending: Collection[int] = ()
) -> None:
    """Add the losses of a step. Those of steps that have no checkpoint, or lie beyond this one, are dropped.

    Args:
        pending: steps whose checkpoints are still being written.

    Raises:
        OSError: it cannot be written.
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
