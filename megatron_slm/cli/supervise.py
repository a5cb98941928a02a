"""`slm-supervise`: starts a training and restarts it from its newest checkpoint when it fails."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command
from megatron_slm.errors import EXIT_UNUSABLE
from megatron_slm.operations.supervisor import Command, RestartPolicy, Supervisor

_FLAGS = {
    "max_restarts": "restarts over the whole life of the supervisor",
    "max_without_progress": "give up after this many restarts in a row without a newer checkpoint",
    "backoff_seconds": "wait before a restart; doubled after each one without progress",
    "max_backoff_seconds": "longest wait before a restart",
    "grace_seconds": "time a stopping run has to save before it is killed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `supervise.py [flags] -- COMMAND`; see `Supervisor.run` for the exit code."""
    return run_command(_run, argv, exit_code=lambda error: EXIT_UNUSABLE)


def _run(words: Sequence[str]) -> int:
    defaults = RestartPolicy()
    parser = ToolParser(
        "Start a training, and restart it from its newest checkpoint when it fails.",
        usage="%(prog)s [flags] -- deepspeed ... tools/pretrain_slm.py ...",
    )
    for name, meaning in _FLAGS.items():
        default = getattr(defaults, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"{meaning} (default: {default})"
        )
    at = words.index("--") if "--" in words else len(words)
    policy = RestartPolicy(**vars(parser.parse_flags(words[:at])))
    return Supervisor(Command.parse(words[at + 1 :]), policy).run()
