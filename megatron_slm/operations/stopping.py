"""Stops a run on request of the scheduler, the user or a flag: all ranks after the same step."""

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
    """Reasons to stop, in ascending priority."""

    NONE = 0
    INTERVAL = 1
    DURATION = 2
    FILE = 3
    LAUNCHER = 4
    SIGNAL = 5
    CANNOT_CONTINUE = 6


_TEXTS = {
    Reason.INTERVAL: "--exit-interval",
    Reason.DURATION: "--exit-duration-in-mins",
    Reason.FILE: f"file {STOP_FILE} in the run's folder",
    Reason.LAUNCHER: "rank {rank} lost its launcher",
    Reason.SIGNAL: "rank {rank} received a signal",
    Reason.CANNOT_CONTINUE: "rank {rank} cannot continue",
}


class StopAskedError(Exception):
    """Raised on all ranks to abort an evaluation; carries the reason to stop."""


class StopRequest:
    """Watches for reasons to stop: SIGTERM, SIGUSR1, SIGINT, the launcher's end, a file, and flags.

    A second SIGINT (Ctrl-C) ends the process at once. A second SIGTERM does not: launchers repeat it while the
    checkpoint is being written.

    Args:
        device: device for the collective in `agreed`.
        run_dir: folder in which rank 0 looks for the file.
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
        """Return the reason for all ranks to stop now, or None. Collective: one all-reduce of one integer.

        Args:
            step_done: the step that has just ended, if it is not the last; flags are checked only then.
            must_stop: True if this rank cannot continue.
        """
        reason, rank = self._highest(self._reason(step_done, must_stop))
        if reason == Reason.NONE:
            return None
        if dist.get_rank() == 0:
            self._file.unlink(missing_ok=True)
        return _TEXTS[reason].format(rank=rank)

    def _highest(self, mine: Reason) -> tuple[Reason, int]:
        """Return the highest reason of all ranks, and the lowest rank that has it. Collective.

        Both travel as one integer, `reason * size + (size - 1 - rank)`, so that one maximum finds both.
        """
        size = dist.get_world_size()
        packed = torch.tensor(mine.value * size + size - 1 - dist.get_rank(), device=self.device)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        reason, reversed_rank = divmod(int(packed), size)
        return Reason(reason), size - 1 - reversed_rank

    def _reason(self, step_done: int | None, must_stop: bool) -> Reason:
        interval, minutes = self._config.exit_interval, self._config.exit_duration_in_mins
        is_rank_0, ends_step = dist.get_rank() == 0, step_done is not None  # rank 0's clock and file decide
        found = {
            Reason.CANNOT_CONTINUE: must_stop,
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
    """The launcher processes above this one, if it was started by a launcher.

    On a signal the `deepspeed` command ends at once and forwards nothing, which would leave the process between it and
    the ranks, and the ranks themselves, running unnoticed. A shell is no launcher: runs may outlive it.
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
        """Return True if a launcher process has ended."""
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
