"""The supervisor's restarts, by exit codes and checkpoints of a stand-in that plays a list of lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_slm.cli.supervise import main
from megatron_slm.errors import ConfigError
from megatron_slm.operations.supervisor import Command, RestartPolicy

STAND_IN = """
import json, os, pathlib, subprocess, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
lives = json.loads((run.parent / "lives.json").read_text())
number = len((run.parent / "argv").read_text().splitlines()) if (run.parent / "argv").exists() else 0
with (run.parent / "argv").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
life = lives[number]
run.mkdir(parents=True, exist_ok=True)
if "saves" in life:
    folder = run / "checkpoints" / f"step_{life['saves']:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": life["saves"] + life.get("unsaved", 0)}) + "\\n")
if life.get("leaves"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(%s)" % life["leaves"]])
    (run.parent / "child").write_text(str(child.pid))
(run.parent / "ready").touch()
while life.get("waits") and not (run / "STOP").exists():
    time.sleep(0.05)
if life.get("ignores"):
    time.sleep(600)
if "signal" in life:
    os.kill(os.getpid(), life["signal"])
sys.exit(life.get("code", 0))
"""


class Supervised:
    """A supervisor's process over a stand-in with the lives given."""

    def __init__(self, folder: Path, lives: list[dict[str, Any]], *flags: str, run_flags: tuple[str, ...] = ()) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        (folder / "pretrain_slm.py").write_text(STAND_IN)
        (folder / "lives.json").write_text(json.dumps(lives))
        run = ["--run-dir", str(self.run_dir), "--train-iters", "100", "--save-interval", "5", *run_flags]
        self.process = subprocess.Popen(
            [sys.executable, "tools/supervise.py", "--backoff-seconds", "0.01", *flags, "--",
             sys.executable, str(folder / "pretrain_slm.py"), *run],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self) -> int:
        _, self.errors = self.process.communicate(timeout=100)
        return self.process.returncode

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run_dir / "supervisor.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == kind]

    def loads(self) -> list[str | None]:
        """What the last --load of each life names."""
        found = []
        for line in (self.folder / "argv").read_text().splitlines():
            argv = json.loads(line)
            found.append(argv[::-1][argv[::-1].index("--load") - 1] if "--load" in argv else None)
        return found


def test_a_run_that_fails_is_started_again_from_its_newest_checkpoint(tmp_path: Path) -> None:
    lives = [{"saves": 5, "code": 1}, {"saves": 10, "signal": 9}, {"saves": 100}]
    run = Supervised(tmp_path, lives)
    assert run.wait() == 0
    saved = str(tmp_path / "run" / "checkpoints")
    assert run.loads() == [None, saved, saved]
    assert [(e["exit_code"], e["checkpoint_step"], e["step"]) for e in run.events("exit")] == [
        (1, 5, 5), (137, 10, 10), (0, 100, 100),
    ]  # fmt: skip
    assert run.events("end")[0]["reason"] == "finished"


def test_the_first_life_keeps_its_own_load(tmp_path: Path) -> None:
    run = Supervised(tmp_path, [{"saves": 5, "code": 1}, {}], run_flags=("--load", "imported"))
    assert run.wait() == 0
    assert run.loads() == ["imported", str(tmp_path / "run" / "checkpoints")]


def test_without_progress_it_gives_up(tmp_path: Path) -> None:
    run = Supervised(
        tmp_path, [{"code": 1}, {"saves": 5, "code": 1}, {"code": 1}, {"code": 7}, {}], "--max-without-progress", "2"
    )
    assert run.wait() == 7
    assert "no newer checkpoint in 2 consecutive attempts" in run.events("end")[0]["reason"]
    assert [e["lives_without_progress"] for e in run.events("wait")] == [1, 0, 1]


def test_restarts_are_bounded_in_all(tmp_path: Path) -> None:
    lives = [{"saves": step, "code": 1} for step in range(5, 40, 5)]
    run = Supervised(tmp_path, lives, "--max-restarts", "2")
    assert run.wait() == 1
    assert len(run.loads()) == 3
    assert "restarted 2 times" in run.events("end")[0]["reason"]


def test_what_cannot_be_used_is_not_started_again(tmp_path: Path) -> None:
    run = Supervised(tmp_path, [{"code": 2}, {}])
    assert run.wait() == 2
    assert len(run.loads()) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_the_run_through_the_file(number: int, tmp_path: Path) -> None:
    run = Supervised(tmp_path, [{"waits": True, "saves": 5}, {}])
    run.wait_until_ready()
    run.process.send_signal(number)
    assert run.wait() == 0
    assert run.events("end")[0]["reason"] == "stopped on request"
    assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.parametrize(("unsaved", "code"), [(0, 0), (1, 143), (-2, 0)])
def test_a_stop_is_well_where_nothing_is_lost(unsaved: int, code: int, tmp_path: Path) -> None:
    """The launcher was hit by the same signal; the last steps may not be in the metrics (--log-interval)."""
    run = Supervised(tmp_path, [{"waits": True, "saves": 5, "unsaved": unsaved, "signal": 15}])
    run.wait_until_ready()
    run.process.terminate()
    assert run.wait() == code


def test_a_run_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    run = Supervised(tmp_path, [{"waits": True, "ignores": True, "leaves": 600}], "--grace-seconds", "1")
    run.wait_until_ready()
    run.process.terminate()
    assert run.wait() == 137
    assert run.events("kill")[0]["reason"] == "still running after --grace-seconds"
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_orphans_are_waited_for_before_the_next_start(tmp_path: Path) -> None:
    run = Supervised(tmp_path, [{"leaves": 2, "code": 1}, {}])
    assert run.wait() == 0
    child = int((tmp_path / "child").read_text())
    assert run.events("orphans")[0]["pids"] == [child]
    assert run.events("exit")[0]["seconds"] >= 2


def test_it_waits_longer_the_longer_nothing_comes_of_it() -> None:
    policy = RestartPolicy(backoff_seconds=10.0, max_backoff_seconds=60.0)
    assert [policy.delay_seconds(n) for n in range(4)] == [10, 20, 40, 60]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bash run.sh", "must contain pretrain_slm.py once, with the run's flags after it"),
        ("deepspeed tools/pretrain_slm.py --train-iters 5", "--save-interval is missing: required by supervise.py"),
        ("deepspeed tools/pretrain_slm.py --train-itres 5", "did you mean --train-iters"),
        (
            "nowhere tools/pretrain_slm.py --train-iters 5 --save-interval 1",
            "command is 'nowhere': must name an executable file",
        ),
    ],
)
def test_commands_it_cannot_use(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Command.parse(command.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-restart 3", "did you mean --max-restarts?"),
        ("--max-restarts many", "--max-restarts is 'many': must be of type int"),
        ("--max-without-progress 0", "--max-without-progress is 0: must be at least 1"),
        ("--grace-seconds nan", "--grace-seconds is nan: must be at least 0"),
    ],
)
def test_flags_it_cannot_use(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags.split(), "--", sys.executable, "tools/pretrain_slm.py"]) == 2
    assert message in capsys.readouterr().err


def test_such_a_command_ends_it_with_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/supervise.py", "--", "bash", "run.sh"], capture_output=True, text=True,
        env={**os.environ}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: command is 'bash run.sh'")
