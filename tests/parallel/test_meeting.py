"""One rank's work may take longer than the time-out of a collective; a rank that is lost or hangs still ends the run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_slm.checkpoint import format as checkpoint_format
from megatron_slm.errors import ConfigError, PeerError
from megatron_slm.flags.load import parse
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel import meeting as meeting_module
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.meeting import Meeting, _Still, raise_on_all_ranks
from megatron_slm.run.resume import open_resume
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import WorldError, run_world

TIME_OUT = 4.0


def read_slowly(seconds: float) -> None:
    """Hash what comes from a slow disk."""
    until, digest = time.monotonic() + seconds, hashlib.sha256()
    while time.monotonic() < until:
        digest.update(bytes(2**20))
        time.sleep(0.1)


def meet(seconds: list[float]) -> tuple[list[int], str, float]:
    """Each rank works for its own time; then one has an error."""
    init_distributed(timedelta(seconds=TIME_OUT))
    rank, started = dist.get_rank(), time.monotonic()
    meeting = Meeting()
    with meeting.working():
        read_slowly(seconds[rank])
    found = meeting.gather(rank)
    took, error = time.monotonic() - started, ""
    try:
        with raise_on_all_ranks():
            if rank == 1:
                raise ConfigError("--x", rank, "be right", "fix it")
    except ConfigError as raised:
        error = str(raised)
    return found, error, took


def test_ranks_wait_for_one_that_works_longer_than_the_time_out() -> None:
    for found, error, took in run_world(meet, 3, [0.0, TIME_OUT + 2, TIME_OUT / 2]):
        assert found == [0, 1, 2]
        assert error == "--x is 1: must be right. Fix: fix it"
        assert took > TIME_OUT


def test_a_watchdog_counts_a_wait_anew_while_the_other_rank_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no wait times out by itself, as on NCCL."""
    watchdog = Watchdog.__new__(Watchdog)
    watchdog.activity, watchdog._wait = Activity(), None
    monkeypatch.setattr(Watchdog, "_waiting_for", lambda self: "in a collective operation")
    answers = iter([[0, _Still.WORKING], [0, 1]])
    monkeypatch.setattr(meeting_module, "all_gather_objects", lambda value: next(answers))
    assert watchdog._seconds_waited() == 0
    assert watchdog._seconds_waited() > 0
    assert Meeting.gather(Meeting.__new__(Meeting), 0) == [0, 1]
    assert watchdog._seconds_waited() == 0
    assert watchdog._seconds_waited() > 0


def beat() -> None:
    """Use a little time for ever, as the watchdog and heartbeats do."""
    while True:
        json.dumps(list(range(1000)))
        time.sleep(0.05)


def lose_one(how: str) -> tuple[str, float]:
    """What the others say, and after how long, where rank 1 does not come back from its work."""
    init_distributed(timedelta(seconds=TIME_OUT))
    for name in ("watchdog", "heartbeats"):
        threading.Thread(target=beat, name=name, daemon=True).start()
    rank, started = dist.get_rank(), time.monotonic()
    try:
        with translate_peer_errors("meeting"), raise_on_all_ranks():
            if rank == 1 and how == "hangs":
                time.sleep(60)
            elif rank == 1:
                read_slowly(TIME_OUT / 2)
                os.kill(os.getpid(), signal.SIGKILL)
    except PeerError as error:
        print(f"after {time.monotonic() - started:.1f} s: {error}", flush=True)
        os._exit(7)
    return "no error", 0.0


@pytest.mark.parametrize(("how", "least", "most"), [("hangs", TIME_OUT, 2 * TIME_OUT), ("is killed", 1.0, TIME_OUT)])
def test_nobody_waits_for_a_rank_that_is_lost(how: str, least: float, most: float) -> None:
    with pytest.raises(WorldError) as failed:
        run_world(lose_one, 3, how, timeout_seconds=60.0, grace_seconds=TIME_OUT)
    assert failed.value.codes[0] == failed.value.codes[2] == 7
    for output in (failed.value.outputs[0], failed.value.outputs[2]):
        assert least - 0.1 < float(output.split("after ")[1].split()[0]) < most
        assert "connection is '" in output


def verify_slowly(values: dict[str, Any]) -> int:
    """Find a checkpoint whose files one rank reads from a slow disk."""
    init_distributed(timedelta(seconds=TIME_OUT))
    real, seconds = checkpoint_format.file_sha256, iter([TIME_OUT + 2])

    def slowly(*args: Any, **kwargs: Any) -> str:
        read_slowly(next(seconds, 0.0))
        return real(*args, **kwargs)

    if dist.get_rank() == 1:
        checkpoint_format.file_sha256 = slowly
    resume = open_resume(parse(flags(values))[0])
    assert resume is not None
    return resume.manifest.step


def save_two_steps(values: dict[str, Any]) -> int:
    return pretrain(parse(flags(values))[0]).state.step


def test_checksums_may_take_longer_than_the_time_out(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(corpus, tmp_path / "run", save_interval=2, load=tmp_path / "run" / "checkpoints")
    assert run_world(save_two_steps, 2, {**values, "train-iters": 2}) == [2, 2]
    assert run_world(verify_slowly, 2, values) == [2, 2]
