"""Starting a run again after what ends clusters' runs: a bounded number of times, and only where it may help.

Joins no process group and holds nothing of the run: all it knows is what the command's flags, its exit code and the
run's folder say.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from megatron_slm.checkpoint.format import complete_checkpoints, step_of
from megatron_slm.config.load import parse
from megatron_slm.config.resilience import STOP_FILE
from megatron_slm.errors import EXIT_UNUSABLE, ConfigError

logger = logging.getLogger(__name__)

SCRIPT = "pretrain_slm.py"
LOG = "supervisor.jsonl"
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER (linux/prctl.h): orphans of the command become children of this process."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How often, and how soon, a run is started again."""

    max_restarts: int = 20
    """Over the whole life of the supervisor; progress does not give any back."""
    max_without_progress: int = 3
    """Lives in a row that end without a newer checkpoint than they started with; progress starts the count anew."""
    backoff_seconds: float = 10.0
    """Before a restart; doubled for each life without progress, to at most `max_backoff_seconds`."""
    max_backoff_seconds: float = 600.0
    grace_seconds: float = 1800.0
    """How long a run that was asked to stop, or whose launcher is gone, has to save before it is killed."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name == "max_without_progress" else 0
            if not value >= least:
                raise ConfigError("--" + name.replace("_", "-"), value, f"is at least {least}", "give a larger number")

    def delay_seconds(self, lives_without_progress: int) -> float:
        """How long to wait before the next start."""
        return min(self.backoff_seconds * 2.0**lives_without_progress, self.max_backoff_seconds)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The command and where its run writes."""

    command: tuple[str, ...]
    run_dir: Path
    save_folder: Path

    @classmethod
    def of(cls, command: Sequence[str]) -> Job:
        """Read the run's flags from the command.

        Raises:
            ConfigError: they are not in it, they are wrong, or the run saves nothing to start again from.
        """
        places = [i for i, word in enumerate(command) if word.endswith(SCRIPT)]
        if len(places) != 1:
            raise ConfigError(
                "command",
                " ".join(command),
                f"has {SCRIPT} and the run's flags as words of their own after it",
                f"give it as: supervise.py -- deepspeed ... tools/{SCRIPT} FLAGS",
            )
        config, _ = parse(command[places[0] + 1 :])
        if config.checkpoint.save_interval is None:
            rule = "is given (a run that saves only at its end has nothing to start again from)"
            raise ConfigError("--save-interval", None, rule, "save every so many steps")
        if shutil.which(command[0]) is None:
            rule = "is a program that can be started"
            raise ConfigError("command", command[0], rule, "check its name, and that its environment is active")
        return cls(command=tuple(command), run_dir=Path(config.logging.run_dir), save_folder=Path(config.save_folder))

    def saved_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        found = complete_checkpoints(self.save_folder) if self.save_folder.is_dir() else []
        return step_of(found[-1]) if found else None

    def next_command(self) -> list[str]:
        """The command, going on from the newest checkpoint where there is one, whatever its own --load says."""
        resumes = [] if self.saved_step() is None else ["--load", str(self.save_folder)]
        return [*self.command, *resumes]

    def step_reached(self) -> int | None:
        """The last step in the run's metrics."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()[-3:]
        except OSError:
            return None
        steps = []
        for line in lines:
            try:
                steps.append(int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
        return max(steps, default=None)


class Supervisor:
    """Runs a job's command until it is done, was asked to stop, or cannot be helped by another start."""

    def __init__(self, job: Job, policy: Policy) -> None:
        self.job, self.policy = job, policy
        self._asked_at: float | None = None
        self._interrupts = 0
        self._command_pid = 0
        job.run_dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """The exit code: 0 where the run is complete or stopped as asked, else that of its last life."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._on_signal)
        lives, idle_lives = 0, 0
        while True:
            before = self.job.saved_step()
            code = self._one_life(lives)
            lives += 1
            after = self.job.saved_step()
            progressed = after is not None and after != before
            idle_lives = 0 if progressed else idle_lives + 1
            if self._asked_at is not None and after is not None and after >= (self.job.step_reached() or 0):
                code = 0  # whatever became of its launcher: nothing is lost (--log-interval may leave steps out)
            verdict = self._verdict(code, lives - 1, idle_lives)
            if verdict is not None:
                self._say("end", exit_code=code, reason=verdict)
                return code
            delay = self.policy.delay_seconds(idle_lives)
            self._say("wait", seconds=delay, restart=lives, lives_without_progress=idle_lives)
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and self._asked_at is None:
                time.sleep(_POLL_SECONDS)
            if self._asked_at is not None:
                self._say("end", exit_code=code, reason="asked to stop before the next start")
                return code

    def _verdict(self, code: int, restarts: int, idle_lives: int) -> str | None:
        """Why this was the last life; None where another one may help."""
        policy = self.policy
        if code == 0:
            return "asked to stop" if self._asked_at is not None else "the run ended well"
        if self._asked_at is not None:
            return "asked to stop, and the run did not end well"
        if code == EXIT_UNUSABLE:
            return "the run would end in the same way again (its error says what to mend)"
        if idle_lives >= policy.max_without_progress:
            return f"no newer checkpoint in {idle_lives} lives in a row (--max-without-progress)"
        if restarts >= policy.max_restarts:
            return f"started again {restarts} times (--max-restarts)"
        return None

    def _one_life(self, number: int) -> int:
        """Run the command once, with all that it starts; its exit code as a shell would give it."""
        command = self.job.next_command()
        self._say("start", life=number, command=command, checkpoint_step=self.job.saved_step())
        started = time.monotonic()
        # a session of its own: a signal to this process's group, like Ctrl-C, reaches the run through this process only
        process = subprocess.Popen(command, start_new_session=True)
        self._command_pid = process.pid
        deadline: float | None = None
        while (code := process.poll()) is None:
            deadline = self._pass_on(deadline)
            time.sleep(_POLL_SECONDS)
        self._wait_for_orphans()
        (self.job.run_dir / STOP_FILE).unlink(missing_ok=True)  # where the run ended before it could see it
        code = code if code >= 0 else 128 - code
        seconds = round(time.monotonic() - started, 1)
        self._say(
            "exit",
            life=number,
            exit_code=code,
            seconds=seconds,
            step=self.job.step_reached(),
            checkpoint_step=self.job.saved_step(),
        )
        return code

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        self._interrupts += number == signal.SIGINT

    def _pass_on(self, deadline: float | None) -> float | None:
        """Ask the run to stop where this process was asked; when it has to be over."""
        if self._asked_at is None:
            return None
        if deadline is None:
            # by a file: DeepSpeed's launchers do not pass signals on, or kill ranks 30 seconds after they did
            (self.job.run_dir / STOP_FILE).touch()
            self._say("stop", grace_seconds=self.policy.grace_seconds)
            deadline = self._asked_at + self.policy.grace_seconds
        if time.monotonic() > deadline or self._interrupts > 1:
            self._kill("a second Ctrl-C" if self._interrupts > 1 else "not over after --grace-seconds")
        return deadline

    def _wait_for_orphans(self) -> None:
        """What outlives the command: ranks whose launcher was killed stop by themselves, and save."""
        if not self._descendants():
            return
        self._say("orphans", pids=[process.pid for process in self._descendants()])
        deadline = time.monotonic() + self.policy.grace_seconds
        while self._descendants():
            if time.monotonic() > deadline or self._interrupts > 1:
                self._kill("its launcher ended and it did not")
            time.sleep(_POLL_SECONDS)

    def _kill(self, reason: str) -> None:
        # not waited for here: that would take the command's exit status from who waits for it
        processes = self._descendants()
        self._say("kill", pids=[process.pid for process in processes], reason=reason)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _descendants(self) -> list[psutil.Process]:
        """All processes of the run on this machine, those included whose parent has ended."""
        alive = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
                elif process.ppid() == os.getpid() and process.pid != self._command_pid:
                    process.wait(0)
            except psutil.Error:
                continue
        return alive

    def _say(self, event: str, **values: Any) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        shown = " ".join(f"{name}={value}" for name, value in values.items() if name != "command")
        logger.info("supervisor: %s %s", event, shown)
        with (self.job.run_dir / LOG).open("a") as file:
            file.write(json.dumps({"time": now, "event": event, **values}) + "\n")
