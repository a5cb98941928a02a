"""Failures as NCCL shows them: nobody's wait fails when a peer dies, and leaving a process group never returns."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_slm.cli import command as module
from megatron_slm.cli.command import run_command
from megatron_slm.engine.pipeline import SelectiveEngine
from megatron_slm.operations import silent_peers
from megatron_slm.operations.watchdog import EXIT_CODE, Watchdog
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.training import command
from tests.support.world import WorldError, run_world

LONGEST_WAIT = 8.0


def behave_like_nccl() -> None:
    """Waits that gloo fails when a connection closes go on, as kernels on a device do; destroying waits for them."""
    for name in ("all_reduce", "all_gather_into_tensor", "recv", "send", "barrier"):
        setattr(dist, name, _deaf(getattr(dist, name)))
    real_isend, real_irecv = dist.isend, dist.irecv
    dist.isend = lambda *args, **kwargs: _DeafWork(real_isend, args, kwargs)  # type: ignore[assignment]
    dist.irecv = lambda *args, **kwargs: _DeafWork(real_irecv, args, kwargs)  # type: ignore[assignment]
    dist.destroy_process_group = lambda *_: _for_ever()
    real_backend = dist.get_backend
    module_dist = dist.distributed_c10d
    module_dist._abort_process_group = lambda *_: print("aborted", flush=True)
    dist.get_backend = lambda *args: "nccl" if not args else real_backend(*args)


def _for_ever() -> None:
    time.sleep(3600)


def _deaf(real: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        except RuntimeError:
            _for_ever()

    return call


class _DeafWork:
    def __init__(self, start: Any, args: Any, kwargs: Any) -> None:
        try:
            self._work = start(*args, **kwargs)
        except RuntimeError:
            self._work = None

    def wait(self) -> None:
        try:
            assert self._work is not None
            self._work.wait()
        except (RuntimeError, AssertionError):
            _for_ever()


def struck(argv: list[str], victim: int, how: str) -> int:
    """The command, in which one rank dies, hangs or runs out of memory in its sixth forward pass."""
    silent_peers.SILENT_SECONDS = 6.0
    real_init = Watchdog.__init__
    Watchdog.__init__ = lambda *args, **named: real_init(*args, **{**named, "longest_wait_seconds": LONGEST_WAIT})  # type: ignore[method-assign]
    real, count = SelectiveEngine._forward, 0

    def forward(self: Any, i: int) -> None:
        nonlocal count
        count += 1
        if count == 6:
            behave_like_nccl()
        if count == 6 and int(os.environ["RANK"]) == victim:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "hung":
                time.sleep(300)  # alive, with a heartbeat, and not in any communication
            raise RuntimeError("CUDA out of memory (stand-in)")
        real(self, i)

    handlers = {kind: forward if one is real else one for kind, one in SelectiveEngine._HANDLERS.items()}
    SelectiveEngine._HANDLERS = handlers
    try:
        return command(argv)
    finally:
        print("ended", flush=True)


def strike(tmp_path: Path, victim: int, how: str) -> WorldError:
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", pipeline_model_parallel_size=2, train_iters=500
    )
    with pytest.raises(WorldError) as failed:
        run_world(struck, 4, flags(values), victim, how, timeout_seconds=240.0, grace_seconds=60.0)
    return failed.value


@pytest.mark.parametrize(("victim", "how"), [(3, "killed"), pytest.param(1, "stopped", marks=pytest.mark.slow)])
def test_a_rank_that_nobody_notices_is_named(victim: int, how: str, tmp_path: Path) -> None:
    """Ranks 0 and 1 are the first stage, 2 and 3 the last."""
    failed = strike(tmp_path, victim, how)
    for rank, output in enumerate(failed.outputs):
        if rank == victim:
            continue
        assert failed.codes[rank] == 1, (rank, failed.codes)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert re.findall(r"rank (\d+) \(host", errors[0]) == [str(victim)], errors[0]


def test_a_hung_rank_is_named_before_nccls_own_limit(tmp_path: Path) -> None:
    failed = strike(tmp_path, 1, "hung")
    assert failed.codes == [EXIT_CODE] * 4, (failed.codes, failed.outputs)
    for rank, output in enumerate(failed.outputs):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert errors[0].startswith(f"error: rank {rank}: ")
        assert "rank 1 (host" in errors[0]
        assert "waits for no other rank" in errors[0]
        assert "--distributed-timeout-minutes" in errors[0]


def test_a_rank_that_fails_prints_its_traceback_first(tmp_path: Path) -> None:
    failed = strike(tmp_path, 2, "out of memory")
    assert failed.codes == [1, 1, 1, 1], failed.codes
    victim = failed.outputs[2]
    assert victim.count("RuntimeError: CUDA out of memory (stand-in)") == 1, victim
    assert victim.index("Traceback") < victim.index("aborted")
    for rank in (0, 1, 3):
        assert "rank 2 (host" in failed.outputs[rank]
        assert "CUDA out of memory" in failed.outputs[rank]


def test_an_error_is_printed_before_anything_is_torn_down(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On NCCL: abort, not destroy, which waits for kernels that never end."""
    printed: list[str] = []

    def fails(_: Any) -> None:
        raise RuntimeError("CUDA out of memory (stand-in)")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it would never return"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: printed.append(capfd.readouterr().err))
    assert run_command(fails, []) == 1
    assert "RuntimeError: CUDA out of memory (stand-in)" in printed[0]
    destroyed: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    assert run_command(lambda _: 0, []) == 0
    assert destroyed == [True]
    assert module.INTERRUPTED == 130
