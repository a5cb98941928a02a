"""Report the state of a run to the recipes' scripts: `python run_state.py folder|stopped FLAGS...`.

FLAGS are the trainer's. `folder` prints the run's folder; `stopped` prints the progress of a run that was stopped, and
nothing if it is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest, complete_checkpoints
from megatron_slm.errors import SlmError
from megatron_slm.flags.load import parse


def folder(flags: Sequence[str]) -> str:
    """Return the run's folder.

    Raises:
        ConfigError: the flags are invalid.
    """
    return parse(flags)[0].logging.run_dir


def stopped(flags: Sequence[str]) -> str:
    """Return the progress of a stopped run as text; empty if it is complete, or saves no checkpoints.

    Raises:
        ConfigError: the flags are invalid.
        CheckpointError: the newest checkpoint is unreadable.
    """
    config, dry_run = parse(flags)
    if dry_run or not config.checkpoint.enabled:
        return ""
    run, last = config.logging.run_dir, config.training.train_iters
    found = complete_checkpoints(Path(config.save_folder))
    if not found:
        return f"{run} was stopped before its first checkpoint; run the same command to start it again."
    step = Manifest.read(found[-1]).step
    return f"{run} was stopped at step {step} of {last}; run the same command to resume it." if step < last else ""


def main() -> int:
    """Print one answer; return the exit code."""
    question, *flags = sys.argv[1:]
    try:
        answer = {"folder": folder, "stopped": stopped}[question](flags)
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code_at_start
    if answer:
        print(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
