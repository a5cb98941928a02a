"""Restarts a run after failures of the cluster: a bounded number of times, and only if a restart may help.

Joins no process group; knows the run only by its command's flags, its exit code and its folder.
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
from collections.abc import Iterator, Sequence
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
class RestartPolicy:
    """Limits on restarts, and the delays before them."""

    max_restarts: int = 20
    """Restarts in total; progress does not reset the count."""
    max_without_progress: int = 3
    """Consecutive attempts that end without a newer checkpoint than they started from."""
    backoff_seconds: float = 10.0
    """Delay before a restart; doubled for each attempt without progress, up to `max_backoff_seconds`."""
    max_backoff_seconds: float = 600.0
    grace_seconds: float = 1800.0
    """Time for a run to save after a stop request or the loss of its launcher, before it is killed."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name == "max_without_progress" else 0
            if not value >= least:
                raise ConfigError("--" + name.replace("_", "-"), value, f"be at least {least}", "give a larger number")

    def delay_seconds(self, attempts_without_progress: int) -> float:
        """Return the delay before the next start."""
        return min(self.backoff_seconds * 2.0**attempts_without_progress, self.max_backoff_seconds)


def _without_load(words: Sequence[str]) -> Iterator[str]:
    """Leave --load and its value out of a command."""
    is_value = False
    for word in words:
        if not is_value and not word.startswith("--load="):
            is_value = word == "--load"
            if not is_value:
                yield word
        else:
            is_value = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A training command, and the folders its run writes to."""

    words: tuple[str, ...]
    run_dir: Path
    save_folder: Path

    @classmethod
    def parse(cls, words: Sequence[str]) -> Command:
        """Read the run's flags from the words of a command.

        Raises:
            ConfigError: the flags are missing or wrong, the program does not exist, or the run saves no checkpoints.
        """
        positions = [i for i, word in enumerate(words) if word.endswith(SCRIPT)]
        if len(positions) != 1:
            raise ConfigError(
                "command",
                " ".join(words),
                f"contain {SCRIPT} once, with the run's flags after it",
                f"run supervise.py -- deepspeed ... tools/{SCRIPT} FLAGS",
            )
        config, _ = parse(words[positions[0] + 1 :])
        if config.checkpoint.save_interval is None:
            purpose = "supervise.py, which resumes from the newest checkpoint"
            raise ConfigError.missing("--save-interval", purpose, "give the number of steps between checkpoints")
        if shutil.which(words[0]) is None:
            fix = "check its name, and activate its environment"
            raise ConfigError("command", words[0], "name an executable file", fix)
        return cls(words=tuple(words), run_dir=Path(config.logging.run_dir), save_folder=Path(config.save_folder))

    def saved_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        found = complete_checkpoints(self.save_folder) if self.save_folder.is_dir() else []
        return step_of(found[-1]) if found else None

    def resuming(self) -> list[str]:
        """Return the command's words, with a --load of the newest checkpoint in place of its own if there is one."""
        if self.saved_step() is None:
            return list(self.words)
        return [*_without_load(self.words), "--load", str(self.save_folder)]

    def step_reached(self) -> int | None:
        """Return the last step in the run's metrics, or None."""
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
    """Runs a command until it finishes, is asked to stop, or another start cannot help."""

    def __init__(self, command: Command, policy: RestartPolicy) -> None:
        self.command, self.policy = command, policy
        self._asked_at: float | None = None
        self._interrupts = 0
        self._command_pid = 0
        command.run_dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Return the exit code: 0 if the run finished or stopped on request, else that of its last attempt."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._on_signal)
        attempts, idle_attempts = 0, 0
        while True:
            before = self.command.saved_step()
            code = self._attempt(attempts)
            attempts += 1
            after = self.command.saved_step()
            progressed = after is not None and after != before
            idle_attempts = 0 if progressed else idle_attempts + 1
            if self._asked_at is not None and after is not None and after >= (self.command.step_reached() or 0):
                code = 0  # even if its launcher failed: nothing is lost (--log-interval may omit steps)
            reason = self._reason_to_end(code, attempts - 1, idle_attempts)
            if reason is not None:
                self._log("end", exit_code=code, reason=reason)
                return code
            delay = self.policy.delay_seconds(idle_attempts)
            self._log("wait", seconds=delay, restart=attempts, lives_without_progress=idle_attempts)
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and self._asked_at is None:
                time.sleep(_POLL_SECONDS)
            if self._asked_at is not None:
                self._log("end", exit_code=code, reason="stop requested before the next start")
                return code

    def _reason_to_end(self, code: int, restarts: int, idle_attempts: int) -> str | None:
        """Return the reason not to start the command again, or None."""
        policy = self.policy
        if code == 0:
            return "stopped on request" if self._asked_at is not None else "finished"
        if self._asked_at is not None:
            return "stop requested, but the run failed"
        if code == EXIT_UNUSABLE:
            return "a restart would fail in the same way (see the run's error)"
        if idle_attempts >= policy.max_without_progress:
            return f"no newer checkpoint in {idle_attempts} consecutive attempts (--max-without-progress)"
        if restarts >= policy.max_restarts:
            return f"restarted {restarts} times (--max-restarts)"
        return None

    def _attempt(self, number: int) -> int:
        """Run the command once and wait for all its processes; return its exit code as a shell would."""
        words = self.command.resuming()
        self._log("start", life=number, command=words, checkpoint_step=self.command.saved_step())
        started = time.monotonic()
        # a session of its own: a signal to this process's group, like Ctrl-C, reaches the run through this process only
        process = subprocess.Popen(words, start_new_session=True)
        self._command_pid = process.pid
        deadline: float | None = None
        while (code := process.poll()) is None:
            deadline = self._forward_stop(deadline)
            time.sleep(_POLL_SECONDS)
        self._wait_for_orphans()
        (self.command.run_dir / STOP_FILE).unlink(missing_ok=True)  # if the run ended before it saw the file
        code = code if code >= 0 else 128 - code
        seconds = round(time.monotonic() - started, 1)
        self._log(
            "exit",
            life=number,
            exit_code=code,
            seconds=seconds,
            step=self.command.step_reached(),
            checkpoint_step=self.command.saved_step(),
        )
        return code

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        if number == signal.SIGINT:
            self._interrupts += 1

    def _forward_stop(self, deadline: float | None) -> float | None:
        """Forward a stop request to the run; return the deadline after which the run is killed, or None."""
        if self._asked_at is None:
            return None
        if deadline is None:
            # by a file: DeepSpeed's launchers do not forward signals, or kill ranks 30 seconds after they did
            (self.command.run_dir / STOP_FILE).touch()
            self._log("stop", grace_seconds=self.policy.grace_seconds)
            deadline = self._asked_at + self.policy.grace_seconds
        if time.monotonic() > deadline or self._interrupts > 1:
            self._kill("second Ctrl-C" if self._interrupts > 1 else "still running after --grace-seconds")
        return deadline

    def _wait_for_orphans(self) -> None:
        """Wait for processes that outlive the command: ranks without a launcher save and stop by themselves."""
        if not self._descendants():
            return
        self._log("orphans", pids=[process.pid for process in self._descendants()])
        deadline = time.monotonic() + self.policy.grace_seconds
        while self._descendants():
            if time.monotonic() > deadline or self._interrupts > 1:
                self._kill("still running after its launcher ended")
            time.sleep(_POLL_SECONDS)

    def _kill(self, reason: str) -> None:
        # no wait here: it would take the command's exit status from `_attempt`
        processes = self._descendants()
        self._log("kill", pids=[process.pid for process in processes], reason=reason)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _descendants(self) -> list[psutil.Process]:
        """Return the run's live processes on this machine, including orphans."""
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

    def _log(self, event: str, **values: Any) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        shown = " ".join(f"{name}={value}" for name, value in values.items() if name != "command")
        logger.info("supervisor: %s %s", event, shown)
        with (self.command.run_dir / LOG).open("a") as file:
            file.write(json.dumps({"time": now, "event": event, **values}) + "\n")
