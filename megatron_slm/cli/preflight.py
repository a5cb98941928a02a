"""The preflight itself, and the command `preflight.py`: flags in, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.config import RunConfig
from megatron_slm.config.load import parse
from megatron_slm.errors import PreflightError, SlmError
from megatron_slm.log import setup_logging
from megatron_slm.operations.preflight.checks import evaluate
from megatron_slm.operations.preflight.facts import gather_facts
from megatron_slm.operations.preflight.links import Measurements, measure
from megatron_slm.operations.preflight.rendezvous import Meeting, meet
from megatron_slm.operations.preflight.report import print_report, verdict, write_report
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.launched import complete_environment

_DESCRIPTION = """Check the machines of a run, started like the run itself, on all of its ranks.

Takes the flags of pretrain_slm.py (see its --help; those of the section `preflight` set what is asked of the machines),
on the command line or in the run's own YAML file. Exit code 0 if no check fails, 1 otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        json_path, config = _parse(sys.argv[1:] if argv is None else argv)
        preflight(config, json_path=json_path)
    except SlmError as error:
        if not isinstance(error, PreflightError):  # of which the table says all
            sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _parse(argv: Sequence[str]) -> tuple[str | None, RunConfig]:
    parser = ToolParser(
        _DESCRIPTION,
        prog="preflight.py",
        usage="deepspeed [launcher's flags] tools/preflight.py --config FILE [--json FILE] [flags of the run]",
    )
    parser.add_argument("--json", metavar="FILE", help="write checks, links and facts there too; - for stdout alone")
    own, rest = parser.parse_known_args(argv)
    return own.json, parse(rest)[0]


def preflight(config: RunConfig, *, json_path: str | None = None, to_stderr: bool = False) -> None:
    """Check the machines, and join the process group on the way. Rank 0 says what was found.

    Args:
        json_path: where rank 0 writes everything; `-` for standard output, without a table.
        to_stderr: where the table goes.

    Raises:
        PreflightError: on every rank alike, a check failed.
        PeerError: a rank did not come, or fell silent.
    """
    complete_environment()
    meeting = Meeting(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    facts, nodes, reachable = meet(meeting, gather_facts(config), config)
    measured: Measurements | None = None
    if reachable:  # else a process group could not be made
        init_distributed(meeting.timeout)
        with translate_peer_errors("measuring links"):
            measured = measure(nodes, seconds=config.preflight.preflight_link_seconds)

    def judge(_: list[None]) -> tuple[bool, str]:
        checks = evaluate(facts, measured, config.preflight)
        if json_path != "-":
            print_report(checks, to_stderr=to_stderr)
        if json_path is not None:  # last: a file that cannot be written costs no report
            write_report(json_path, checks, facts, measured)
        return not any(check.status == "failed" for check in checks), verdict(checks)

    ready, said = meeting.settle("verdict", None, judge, ranks=[])
    meeting.leave()
    if not ready:
        rule, fix = "finds every node ready", "see the table of rank 0's output, which names nodes and remedies"
        raise PreflightError("preflight", said, rule, fix)
