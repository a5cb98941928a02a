"""What the recipes ask about a run, told by the trainer's own flags: `python run_state.py QUESTION FLAGS...`.

`folder` prints the run's folder; `stopped`, where its launch ended well, how far it is, and nothing if it is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest, complete_checkpoints
from megatron_slm.config.load import parse
from megatron_slm.errors import SlmError


def folder(flags: Sequence[str]) -> str:
    """The run's folder.

    Raises:
        ConfigError: the flags are wrong.
    """
    return parse(flags)[0].logging.run_dir


def stopped(flags: Sequence[str]) -> str:
    """How far the run is, and what to do; empty if it is complete, or saves nothing that could tell.

    Raises:
        ConfigError: the flags are wrong.
        CheckpointError: the newest checkpoint cannot be read.
    """
    config, dry_run = parse(flags)
    if dry_run or not config.checkpoint.enabled:
        return ""
    run, last = config.logging.run_dir, config.training.train_iters
    found = complete_checkpoints(Path(config.save_folder))
    if not found:
        return f"{run} was stopped before its first checkpoint; the same command starts it again."
    step = Manifest.read(found[-1]).step
    return f"{run} was stopped at step {step} of {last}; the same command goes on with it." if step < last else ""


def main() -> int:
    """Answer one question; the exit code."""
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
