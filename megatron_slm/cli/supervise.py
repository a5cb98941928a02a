"""The command `supervise.py`: starts a training and restarts it from its newest checkpoint when it fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.errors import EXIT_UNUSABLE, SlmError
from megatron_slm.log import setup_logging
from megatron_slm.operations.supervisor import Command, RestartPolicy, Supervisor

_FLAGS = {
    "max_restarts": "starts after the first, in all",
    "max_without_progress": "lives in a row without a newer checkpoint, after which it gives up",
    "backoff_seconds": "wait before a start; doubled for each life without progress",
    "max_backoff_seconds": "the longest such wait",
    "grace_seconds": "time to save for a run that was asked to stop, or outlives its launcher, before it is killed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command `supervise.py [flags] -- COMMAND`; see `Supervisor.run` for the exit code."""
    defaults = RestartPolicy()
    parser = ToolParser(
        "Start a training, and start it again from its newest checkpoint when it fails.",
        prog="supervise.py",
        usage="%(prog)s [flags] -- deepspeed ... tools/pretrain_slm.py ...",
    )
    for name, meaning in _FLAGS.items():
        default = getattr(defaults, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"{meaning} (default: {default})"
        )
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    setup_logging()
    try:
        policy = RestartPolicy(**vars(parser.parse_flags(words[:at])))
        return Supervisor(Command.parse(words[at + 1 :]), policy).run()
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_UNUSABLE
