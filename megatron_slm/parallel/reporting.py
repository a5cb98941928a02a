"""Has the ranks of a launch report an error once."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_slm.log import Reports, report_in
from megatron_slm.parallel.collectives import broadcast_from_rank_0


def report_together(run_dir: str) -> None:
    """Keep tracebacks in `run_dir`/logs, and print an error once for all ranks. Collective over the world."""
    rank, launch = dist.get_rank(), broadcast_from_rank_0(uuid.uuid4().hex)
    reports = Reports(Path(run_dir) / "logs", rank, launch)
    if rank == 0:
        reports.clear()
    report_in(reports)
