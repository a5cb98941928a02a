"""A benchmark's job in several processes of one CPU world."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(name: str, job: dict[str, Any], *, num_ranks: int) -> list[dict[str, Any]]:
    """Start `benchmark.py NAME --child JOB` in every rank, one thread each; the records that rank 0 prints last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "benchmark.py"), name, "--child"]
    world = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    ranks = []
    for rank in range(num_ranks):
        environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        ranks.append(subprocess.Popen([*command, json.dumps(job)], env=environment, stdout=output, text=True))
    found = ranks[0].communicate()[0]
    if any([process.wait() for process in ranks]):
        raise RuntimeError(f"a rank of {job} failed; its error stands above")
    return json.loads(found.splitlines()[-1])  # type: ignore[no-any-return]
