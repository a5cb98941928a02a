"""Checks the machines of a run on all of its ranks, before the run."""

from __future__ import annotations

from datetime import timedelta

from megatron_slm.config import RunConfig
from megatron_slm.errors import PreflightError
from megatron_slm.operations.preflight.checks import evaluate
from megatron_slm.operations.preflight.facts import gather_facts
from megatron_slm.operations.preflight.links import Measurements, measure
from megatron_slm.operations.preflight.rendezvous import Meeting, meet
from megatron_slm.operations.preflight.report import print_report, verdict, write_report
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.launched import complete_environment


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
