"""Signals to the launchers' processes, and dead ranks: a checkpoint, exit codes, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_slm.checkpoint.format import find_checkpoint, step_of
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import free_port

BIN = Path(sys.executable).parent
SUPERVISED = [sys.executable, "tools/supervise.py", "--backoff-seconds", "0.1", "--"]


class Launched:
    """A run of two stages under the `deepspeed` command."""

    def __init__(
        self, folder: Path, *, num_ranks: int = 4, supervised: bool = False, train_iters: int = 100_000
    ) -> None:
        self.run_dir = folder / "run"
        values = run_flags(
            write_corpus(folder / "corpus"), self.run_dir, pipeline_model_parallel_size=2, train_iters=train_iters,
            save_interval=2 if supervised else 1000_000, keep_last=2,
        )  # fmt: skip
        command = [
            str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(free_port()),
            "tools/pretrain_slm.py", *flags(values),
        ]  # fmt: skip
        keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        self.log = (folder / "log").open("w+")
        self.process = psutil.Popen(
            [*SUPERVISED * supervised, *command], stdout=self.log, stderr=subprocess.STDOUT,
            env={**keep, "PATH": f"{BIN}:{keep['PATH']}", "DS_ACCELERATOR": "cpu"}, start_new_session=True,
        )  # fmt: skip
        self.family: list[psutil.Process] = []

    def wait_for_step(self, step: int) -> None:
        """Wait until the step is in the metrics, and remember all processes."""
        deadline = time.monotonic() + 200
        while self.step() < step:
            assert time.monotonic() < deadline, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.1)
        self.family = self.process.children(recursive=True)

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def rank(self, rank: int) -> psutil.Process:
        (found,) = [p for p in self.ranks() if p.environ()["RANK"] == str(rank)]
        return found

    def ranks(self) -> list[psutil.Process]:
        is_rank = [p for p in self.family if any(w.endswith("pretrain_slm.py") for w in p.cmdline()[:3])]
        return [p for p in is_rank if "RANK" in p.environ()]

    def launch(self) -> psutil.Process:
        (found,) = [p for p in self.family if "deepspeed.launcher.launch" in p.cmdline()]
        return found

    def wait(self, timeout_seconds: float = 100) -> int:
        """The command's exit code, once it and all it started are gone."""
        code = self.process.wait(timeout_seconds)
        _, alive = psutil.wait_procs(self.family, timeout=timeout_seconds)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}\n{self.output()}"
        return int(code)

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def check_saved_at_the_end(self) -> None:
        assert step_of(find_checkpoint(self.run_dir / "checkpoints")) == self.step()
        assert f"stopped after step {self.step()}" in " ".join(self.output().split())


def test_sigterm_to_the_command(tmp_path: Path) -> None:
    """It ends at once and passes nothing on; the ranks miss it."""
    run = Launched(tmp_path, num_ranks=2)
    run.wait_for_step(3)
    run.process.terminate()
    assert run.wait() == -signal.SIGTERM
    run.check_saved_at_the_end()
    assert "lost its launcher" in " ".join(run.output().split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank(number: signal.Signals, tmp_path: Path) -> None:
    run = Launched(tmp_path)
    run.wait_for_step(3)
    run.rank(2).send_signal(number)
    assert run.wait() == 0
    run.check_saved_at_the_end()
    assert "asked to stop (rank 2 received a signal)" in " ".join(run.output().split())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_the_process_between(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """DeepSpeed's launch.py passes SIGTERM on, and says 1 whatever became of it. SIGUSR1 ends it, of which the command
    above makes a 0."""
    run = Launched(tmp_path)
    run.wait_for_step(3)
    run.launch().send_signal(number)
    assert run.wait() == code
    run.check_saved_at_the_end()


@pytest.mark.slow
def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    run = Launched(tmp_path)
    run.wait_for_step(3)
    struck = time.monotonic()
    run.rank(2).kill()
    assert run.wait() not in (0, 2)
    assert time.monotonic() - struck < 10 + 20, "the launcher looks once a second and ends ranks one by one"
    errors = [line for line in run.output().splitlines() if line.startswith("error: rank ")]
    assert {re.match(r"error: rank (\d)", line)[1] for line in errors} == {"0", "1", "3"}, errors
    assert all("rank 2 (host " in line for line in errors), errors


@pytest.mark.slow
def test_supervised_a_killed_rank_costs_a_restart(tmp_path: Path) -> None:
    run = Launched(tmp_path, supervised=True, train_iters=60)
    run.wait_for_step(5)
    run.rank(1).kill()
    assert run.wait(300) == 0
    events = [json.loads(line) for line in (run.run_dir / "supervisor.jsonl").read_text().splitlines()]
    exits = [event for event in events if event["event"] == "exit"]
    assert len(exits) == 2
    assert exits[0]["exit_code"] not in (0, 2)
    assert exits[0]["checkpoint_step"] >= 4
    assert exits[1]["step"] == 60
    assert f"resuming after step {exits[0]['checkpoint_step']}" in run.output()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_supervised_a_signal_stops_it_well(number: signal.Signals, tmp_path: Path) -> None:
    run = Launched(tmp_path, supervised=True)
    run.wait_for_step(3)
    run.process.send_signal(number)
    assert run.wait() == 0
    run.check_saved_at_the_end()


@pytest.mark.slow
def test_supervised_its_command_is_killed(tmp_path: Path) -> None:
    """The ranks stop and save before they are started again."""
    run = Launched(tmp_path, supervised=True, train_iters=60)
    run.wait_for_step(5)
    (command,) = [p for p in run.family if any(word.endswith("/deepspeed") for word in p.cmdline()[:3])]
    command.kill()
    assert run.wait(300) == 0
    assert run.step() == 60
    assert re.search(r"asked to stop \(rank \d lost its launcher\)", " ".join(run.output().split()))
