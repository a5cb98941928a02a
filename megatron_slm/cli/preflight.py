"""`slm-preflight`: checks the machines of a run, started like the run itself."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import PreflightError
from megatron_slm.flags.load import parse

_DESCRIPTION = """Check the machines of a run, started like the run itself, on all of its ranks.

Takes the flags of pretrain_slm.py (see its --help; section `preflight` sets the requirements), on the command line or
in the run's own YAML file. Exits with 0 if no check fails, else with 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if no check fails, else 1."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> int:
    json_path, config = _parse(words)
    choose_accelerator()
    from megatron_slm.preflight.run import preflight

    try:
        preflight(config, json_path=json_path)
    except PreflightError:  # rank 0 has printed every check
        return 1
    return 0


def _parse(argv: Sequence[str]) -> tuple[str | None, RunConfig]:
    parser = ToolParser(
        _DESCRIPTION,
        prog="preflight.py",
        usage="deepspeed [launcher's flags] tools/preflight.py --config FILE [--json FILE] [flags of the run]",
    )
    parser.add_argument("--json", metavar="FILE", help="also write checks, links and facts as JSON; - prints JSON only")
    own, rest = parser.parse_known_args(argv)
    return own.json, parse(rest)[0]
