"""Progress of a run on the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_text(values: Mapping[str, Any]) -> str:
    """Return a step's losses, kept share, speed and utilization, in one line; leaves out what is not known."""
    loss, loss_all, reference = (values.get(name) for name in ("loss", "loss_all", "reference_loss"))
    keep, mfu = values.get("keep_fraction"), values.get("mfu")
    parts = [f"loss {loss:.3f}" if loss is not None else "loss -"]
    others = []
    if loss_all is not None and keep is not None and keep < 1:
        others.append(f"all {loss_all:.3f}")
    if reference is not None:
        others.append(f"reference {reference:.3f}")
    if others:
        parts[0] += f" ({', '.join(others)})"
    if keep is not None and keep < 1:
        parts.append(f"kept {keep:.0%}")
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    return "  ".join(parts)


class ProgressLine:
    """Progress on the console: a live bar on a terminal, else a plain line from time to time.

    Args:
        title: begins each line.
        total_steps: last step of the run.
        start: steps already done.
        quiet: print warnings only.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        start: int,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = Console(stderr=True)
        self.title, self.total, self.quiet, self._clock = title, total_steps, quiet, clock
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total_steps, completed=start, text="")
        self._interval, self._printed_at = max(1, total_steps // 20), 0.0
        self._first: tuple[int, float] | None = None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the progress after `step`."""
        text, now = progress_text(values), self._clock()
        self._first = self._first or (step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._interval == 0 or step in (1, self.total) or now - self._printed_at > 30:
            self._printed_at = now
            self.print(f"{self.title}  step {step}/{self.total}  {text}{self._time_left(step, now)}")

    def _time_left(self, step: int, now: float) -> str:
        """Return the time to the last step at the mean pace since the first one seen; empty where it is unknown."""
        assert self._first is not None, "set by update"
        first, since = self._first
        if step in (first, self.total):
            return ""
        seconds = (now - since) / (step - first) * (self.total - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def print(self, text: str, *, always: bool = False) -> None:
        """Print a line; a console that cannot be written (full disk, lost terminal) does not end the run.

        Args:
            always: print it with --quiet too.
        """
        if self.quiet and not always:
            return
        with suppress(OSError):
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the live bar."""
        if self._bar is not None:
            self._bar.stop()
