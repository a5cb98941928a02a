"""Run a function on every rank of a small gloo world, in processes forked from a parent that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])


class WorldError(AssertionError):
    """A rank failed; the message holds its output."""

    def __init__(self, message: str, codes: list[int | None], outputs: list[str]) -> None:
        super().__init__(message)
        self.codes, self.outputs = codes, outputs


def reported_error(failed: WorldError) -> str:
    """The one error line that the ranks of a world print together; none of them prints a traceback."""
    assert not any("Traceback" in output for output in failed.outputs)
    [line] = [line for output in failed.outputs for line in output.splitlines() if line.startswith("error: ")]
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    rank: int, world_size: int, port: int, folder: str, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    out = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    code = 1
    try:
        result = target(*args)
        Path(f"{folder}/{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_world(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    grace_seconds: float = 5.0,
) -> list[Any]:
    """`target(*args)` on every rank; the ranks' results. `target` is a module-level function.

    Once a rank has failed, the others have `grace_seconds` to end by themselves, beside the time for which they wait
    for a core.

    Raises:
        WorldError: a rank failed or the time ran out; every process is gone by then.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes: list[BaseProcess] = [
            _CONTEXT.Process(target=_rank_main, args=(rank, world_size, port, folder, target, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        timed_out = _wait(processes, timeout_seconds, grace_seconds)
        codes = [process.exitcode for process in processes]
        logs = [Path(f"{folder}/{rank}.log") for rank in range(world_size)]
        outputs = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
        if timed_out or any(codes):
            reason = "time ran out" if timed_out else f"exit codes {codes}"
            text = "\n".join(f"--- rank {rank}\n{output[-3000:]}" for rank, output in enumerate(outputs))
            raise WorldError(f"{reason}\n{text}", codes, outputs)
        return [pickle.loads(Path(f"{folder}/{rank}.result").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[BaseProcess], timeout_seconds: float, grace_seconds: float) -> bool:
    """Wait for all; once one has failed, give the others a moment and end them. True if time ran out."""
    deadline, failed_at = time.monotonic() + timeout_seconds, None
    queued_before: dict[int | None, float] = {}
    while running := [process for process in processes if process.is_alive()]:
        now = time.monotonic()
        if failed_at is None and any(process.exitcode for process in processes):
            failed_at, queued_before = now, {process.pid: _queued_seconds(process) for process in running}
        queued = max((_queued_seconds(one) - queued_before.get(one.pid, 0.0) for one in running), default=0.0)
        if now > deadline or (failed_at is not None and now > failed_at + grace_seconds + queued):
            for process in processes:
                process.kill()
                process.join()
            return now > deadline
        time.sleep(0.02)
    return False


def _queued_seconds(process: BaseProcess) -> float:
    """Time for which a process has waited for a core: on a busy machine it is most of its time."""
    with suppress(OSError):  # it has ended meanwhile
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0
