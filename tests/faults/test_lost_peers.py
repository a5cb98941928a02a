"""A rank that dies or stops responding within a step: all ranks end soon, with an error that names it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_slm.engine.pipeline import SelectiveEngine
from megatron_slm.loss.objective import Objective
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command
from tests.support.world import WorldError, run_world


def command_struck(argv: list[str], victim: int, number: int, where: str, moment: int) -> int:
    """The command, in which rank `victim` gets a signal when it does `where` for the `moment`th time."""
    owner: type = Objective if where == "statistics" else SelectiveEngine
    real, count = getattr(owner, where), 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment and int(os.environ["RANK"]) == victim:
            print(f"struck at {time.time()}", flush=True)
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, where, struck)
    SelectiveEngine._HANDLERS = {
        kind: getattr(SelectiveEngine, where) if handler is real else handler
        for kind, handler in SelectiveEngine._HANDLERS.items()
    }
    leave = os._exit

    def noted(code: int) -> NoReturn:
        """By the command's return, or by the watchdog, whichever is first."""
        print(f"ended at {time.time()}", flush=True)
        leave(code)

    os._exit = noted
    return command(argv)


def moment_of(output: str, event: str) -> float:
    found = re.search(rf"{event} at ([\d.]+)", output)
    assert found, output
    return float(found[1])


def names(error: str) -> set[int]:
    """The ranks that an error reports as lost."""
    found = re.findall(r"rank (\d+) \(host \S+, pid \d+\) does not respond, last seen ", error)
    return {int(rank) for rank in found} | ({0} if "rank 0, which hosts the heartbeats, " in error else set())


def strike(tmp_path: Path, victim: int, number: int, where: str, moment: int, *, minutes: float) -> list[str]:
    """The errors of the ranks that were left, checked to come soon after; by rank, without the victim."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, pipeline_model_parallel_size=2,
        train_iters=500, distributed_timeout_minutes=minutes,
    )  # fmt: skip
    grace = 20.0 if number == signal.SIGKILL else 12.0
    with pytest.raises(WorldError) as failed:
        run_world(command_struck, 4, flags(values), victim, number, where, moment, grace_seconds=grace)
    outputs, codes = failed.value.outputs, failed.value.codes
    errors = []
    for rank, output in enumerate(outputs):
        if rank == victim:
            continue
        assert codes[rank] == 1, (rank, codes)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, output
        assert lines[0].startswith(f"error: rank {rank}: ")
        assert "--distributed-timeout-minutes" in lines[0]
        assert "Traceback" not in output
        assert names(lines[0]) == {victim}, f"every rank names the one that is lost: {lines[0]}"
        late = moment_of(output, "ended") - moment_of(outputs[victim], "struck")
        assert late < 10 + (60 * minutes if number == signal.SIGSTOP else 0), f"rank {rank} ended after {late} s"
        errors.append(f"{lines[0]} after {late:.1f} s")
    return errors


@pytest.mark.parametrize(
    ("victim", "where"), [(0, "_forward"), (3, "_loss"), pytest.param(1, "_forward", marks=pytest.mark.slow)]
)
def test_a_rank_that_is_killed(victim: int, where: str, tmp_path: Path) -> None:
    """Ranks 0 and 1 are the first stage, 2 and 3 the last; 0 and 2 are one pipeline, 1 and 3 the other."""
    errors = strike(tmp_path, victim, signal.SIGKILL, where, 6, minutes=10.0)
    neighbour, lane = (victim + 2) % 4, "backward" if victim > 1 else r"\w+"
    named = rf"rank {neighbour}: (sending to|receiving from) rank {victim}, {lane} lane"
    assert any(re.search(named, error) for error in errors), errors


def test_a_rank_that_is_killed_before_a_collective(tmp_path: Path) -> None:
    errors = strike(tmp_path, 2, signal.SIGKILL, "_optimizer_step", 6, minutes=10.0)
    assert any(
        re.search(r"stage \d, (ReduceGrads|ReduceTiedGrads|OptimizerStep): connection is", error) for error in errors
    ), errors


def test_a_rank_that_is_silent(tmp_path: Path) -> None:
    errors = strike(tmp_path, 0, signal.SIGSTOP, "_forward", 6, minutes=0.1)
    assert any("Timed out" in error for error in errors), errors
