"""Runs that are killed (SIGKILL) at a chosen moment: after a time, or in the middle of what a save does to the disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.training import train_and_report

DISK_CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink"))


@dataclass(frozen=True)
class Kill:
    """When whom."""

    ranks: tuple[int, ...]
    after_seconds: float | None = None
    """From the start of the process's work; None: at a call to the disk."""
    disk_call: int = 0
    """Which of the calls that files are committed and deleted with, counted from the first checkpoint on."""
    before: bool = False
    """Right before that call, or right after it."""


def random_kill(generator: random.Random, num_ranks: int, *, seconds: tuple[float, float]) -> Kill:
    """One rank or all of them after a random time, or one of them in the middle of a save."""
    victim = (generator.randrange(num_ranks),)
    kind = generator.choice(["one", "all", "saving"])
    if kind == "saving":
        return Kill(victim, disk_call=generator.randrange(1, 50), before=generator.random() < 0.5)
    return Kill(victim if kind == "one" else tuple(range(num_ranks)), after_seconds=generator.uniform(*seconds))


def train_and_be_killed(values: dict[str, Any], kill: Kill) -> dict[str, Any]:
    """`train_and_report`, but for the kill; it returns where the run was over before it."""
    if int(os.environ["RANK"]) in kill.ranks:
        if kill.after_seconds is not None:
            threading.Thread(target=_kill_later, args=(kill.after_seconds,), daemon=True).start()
        else:
            _kill_at_disk_call(kill)
    return train_and_report(values)


def _kill_later(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_disk_call(kill: Kill) -> None:
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill.disk_call and kill.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls >= kill.disk_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in DISK_CALLS:
        setattr(module, name, counted(getattr(module, name)))


def timed_training(values: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """`train_and_report`, and how long it took in seconds."""
    started = time.monotonic()
    return train_and_report(values), time.monotonic() - started
