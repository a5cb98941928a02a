"""Checks the machines of a run on all of its ranks, before the run."""

from __future__ import annotations

from datetime import timedelta

from megatron_slm.config.run import RunConfig
from megatron_slm.errors import PreflightError
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.launched import complete_environment
from megatron_slm.preflight.checks import evaluate
from megatron_slm.preflight.facts import gather_facts
from megatron_slm.preflight.links import Measurements, measure
from megatron_slm.preflight.rendezvous import Rendezvous, exchange_facts
from megatron_slm.preflight.report import print_report, verdict, write_report


def preflight(config: RunConfig, *, json_path: str | None = None, to_stderr: bool = False) -> None:
    """Check the machines, and report on rank 0. Initializes the process group, if all nodes can connect.

    Args:
        json_path: file for rank 0's JSON report; `-` is standard output, without a table.
        to_stderr: print the table to standard error.

    Raises:
        PreflightError: on all ranks, if a check failed.
        PeerError: a rank did not report, or stopped responding.
    """
    complete_environment()
    rendezvous = Rendezvous(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    facts, nodes, reachable = exchange_facts(rendezvous, gather_facts(config), config)
    measured: Measurements | None = None
    if reachable:  # else a process group cannot form
        init_distributed(rendezvous.timeout)
        with translate_peer_errors("measuring links"):
            measured = measure(nodes, seconds=config.preflight.preflight_link_seconds)

    def judge(_: list[None]) -> tuple[bool, str]:
        checks = evaluate(facts, measured, config.preflight)
        if json_path != "-":
            print_report(checks, to_stderr=to_stderr)
        if json_path is not None:  # last, because it may fail
            write_report(json_path, checks, facts, measured)
        return not any(check.status == "failed" for check in checks), verdict(checks)

    ready, result = rendezvous.decide_on_rank_0("verdict", None, judge, ranks=[])
    rendezvous.leave()
    if not ready:
        fix = "see the table in rank 0's output, which names the nodes and the fixes"
        raise PreflightError("preflight", result, "be 'ready'", fix)
