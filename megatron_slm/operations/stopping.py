"""Stopping cleanly when the scheduler, the user or a flag asks: all ranks after the same step."""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_slm.config.resilience import STOP_FILE, ResilienceConfig


class Reason(IntEnum):
    """Why a rank asks to stop; where several ask, the highest is named."""

    NONE = 0
    INTERVAL = 1
    DURATION = 2
    FILE = 3
    LAUNCHER = 4
    SIGNAL = 5
    CANNOT_GO_ON = 6


_WORDS = {
    Reason.INTERVAL: "--exit-interval",
    Reason.DURATION: "--exit-duration-in-mins",
    Reason.FILE: f"the file {STOP_FILE} in the run's folder",
    Reason.LAUNCHER: "its launcher is gone",
    Reason.SIGNAL: "a signal",
    Reason.CANNOT_GO_ON: "it cannot go on",
}


class StopAskedError(Exception):
    """Leaves an evaluation, on all ranks alike; the argument is the reason."""


class StopRequest:
    """What asks this rank to stop: SIGTERM, SIGUSR1 or SIGINT, the end of its launcher, a file, or a flag.

    A second SIGINT (Ctrl-C) ends the process at once. A second SIGTERM does not: launchers send it again to
    processes that they were asked to end, while the checkpoint is being written.

    Args:
        device: that the agreement is made on.
        run_dir: where the file is looked for, by rank 0.
    """

    def __init__(self, device: torch.device, config: ResilienceConfig, run_dir: Path) -> None:
        self.device, self._config, self._signalled = device, config, False
        self._file = run_dir / STOP_FILE
        self._launcher = _Launcher()
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self, *, step_done: int | None = None, must_stop: bool = False) -> str | None:
        """Why all ranks stop here: what the first of the highest reason says. None where none asks. Collective.

        One all-reduce of one number. What a clock says is asked of rank 0's alone.

        Args:
            step_done: number of a step that has just ended and is not the last; what flags ask for counts then.
            must_stop: this rank cannot go on.
        """
        mine, size = self._reason(step_done, must_stop), dist.get_world_size()
        asked = torch.tensor(int(mine) * size + size - 1 - dist.get_rank(), device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        reason, from_the_end = divmod(int(asked), size)
        if reason == Reason.NONE:
            return None
        if dist.get_rank() == 0:
            self._file.unlink(missing_ok=True)
        of_one_rank = reason in (Reason.LAUNCHER, Reason.SIGNAL, Reason.CANNOT_GO_ON)
        return f"rank {size - 1 - from_the_end}: " * of_one_rank + _WORDS[Reason(reason)]

    def _reason(self, step_done: int | None, must_stop: bool) -> Reason:
        interval, minutes = self._config.exit_interval, self._config.exit_duration_in_mins
        is_rank_0, ends_step = dist.get_rank() == 0, step_done is not None
        found = {
            Reason.CANNOT_GO_ON: must_stop,
            Reason.SIGNAL: self._signalled,
            Reason.LAUNCHER: self._launcher.is_gone(),
            Reason.FILE: is_rank_0 and self._file.exists(),
            Reason.DURATION: is_rank_0 and ends_step and minutes is not None and _process_minutes() > minutes,
            Reason.INTERVAL: step_done is not None and interval is not None and step_done % interval == 0,
        }
        return max((reason for reason, asks in found.items() if asks), default=Reason.NONE)


def _process_minutes() -> float:
    return (time.time() - psutil.Process().create_time()) / 60


class _Launcher:
    """The processes that started this one, as far as they are a launcher's.

    The `deepspeed` command ends at once when it is sent a signal, and passes nothing on; the process between it and
    the ranks, and the ranks, would go on without anyone knowing. A shell is not a launcher: runs may outlive it.
    """

    def __init__(self) -> None:
        self._parent = psutil.Process().parent()
        self._grandparent: int | None = None
        words = _command(self._parent)
        if "deepspeed.launcher.launch" in words:
            above = self._parent.parent() if self._parent is not None else None
            if any(word.endswith(("/deepspeed", "deepspeed.launcher.runner")) for word in _command(above)[:4]):
                self._grandparent = above.pid if above is not None else None
        elif not any(word.endswith(("/torchrun", "torch.distributed.run")) for word in words[:4]):
            self._parent = None

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        if self._parent is None:
            return False
        if os.getppid() != self._parent.pid:
            return True
        try:
            return self._grandparent is not None and self._parent.ppid() != self._grandparent
        except psutil.NoSuchProcess:
            return True


def _command(process: psutil.Process | None) -> list[str]:
    try:
        return process.cmdline() if process is not None else []
    except psutil.Error:
        return []
