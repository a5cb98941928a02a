"""A thread that sees when this rank's training does not go on, says why, and ends the run.

Two levels. A phase that takes longer than its limit is reported: every rank writes its stack and its place in the
schedule, and one rank reads what all say of themselves and names the one that the others wait for. After
`--watchdog-exit-factor` times the limit all do so again, and end. Where another rank is lost (its connection closed, or
a wait timed out) nothing has to be waited for: all learn of it at once, name the lost rank, and end.

What the ranks agree on here goes through a store of its own (`heartbeats.py`), since collectives are what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch.distributed as dist

from megatron_slm.config.resilience import ResilienceConfig
from megatron_slm.errors import PeerError, SlmError
from megatron_slm.operations.hang_report import Record, Verdict, is_in_collective, main_stack, table, verdict
from megatron_slm.operations.heartbeats import Heartbeats, StoreLostError, StoreSilentError
from megatron_slm.parallel.activity import Activity, LoopState, Moment

logger = logging.getLogger(__name__)

EXIT_CODE = 3
"""Of a run that the watchdog ended."""
FOLDER = "hang"
"""In the run's folder: the reports."""
_HAS_MEDIAN = 3
"""Durations from which on a median is trusted."""
_LAST_RESORT_SECONDS = 60.0
"""How long after the end of its time a process is ended that does not let this thread run."""
_WINDOW_SECONDS = 2.0
"""Least time in which a rank that lives is expected to say so, on a busy machine too."""
_Alarm = Literal["slow", "end", "lost"]


class Watchdog:
    """Watches the training of this rank from `__enter__` to `__exit__`; without effect with --watchdog-factor 0.

    Collective over the world.
    """

    def __init__(self, activity: Activity, config: ResilienceConfig, run_dir: Path) -> None:
        self.activity, self._config, self._folder = activity, config, run_dir / FOLDER
        self.enabled = config.watchdog_factor > 0
        self._interval = max(min(1.0, config.watchdog_min_seconds / 4), dist.get_world_size() / 500)
        self._watched = activity.moment, 60 * config.watchdog_allowance_minutes
        """A phase and its limit in seconds, replaced together."""
        self._rank, self._host = dist.get_rank(), socket.gethostname()
        self._beat, self._num_alarms = 0, 0
        self._ended: str | None = None
        self._is_lost = False
        self._reported: Moment | None = None
        self._wake, self._closed, self._explained = threading.Event(), False, threading.Event()
        self._verdict: Verdict | None = None
        self._last_word = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ---- what the training thread calls ----------------------------------------------------------------

    def enter(self, state: LoopState, step: int) -> None:
        """The loop goes on to this phase."""
        before = self.activity.moment
        if before is self._reported:
            logger.warning("%s of step %d went on after %.0f s", before.state.value, before.step, _since(before))
        self.activity.enter(state, step)
        if not self.enabled:
            return
        config, seconds = self._config, self.activity.durations[state]
        limit = 60 * config.watchdog_allowance_minutes
        if state in (LoopState.STEP, LoopState.EVALUATION) and len(seconds) >= _HAS_MEDIAN:
            limit = max(config.watchdog_min_seconds, config.watchdog_factor * median(seconds))
        self._watched = self.activity.moment, limit
        # a thread in C that needs no interpreter: for a call that hangs and holds the interpreter's lock
        last_resort = limit * config.watchdog_exit_factor + _LAST_RESORT_SECONDS
        faulthandler.dump_traceback_later(last_resort, exit=True, file=2)

    def __enter__(self) -> Watchdog:
        if self.enabled:
            self._heartbeats = Heartbeats(self._record().to_dict())
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.enabled:
            return
        faulthandler.cancel_dump_traceback_later()
        if error is not None:
            self._ended = f"{type(error).__name__}: {error}".splitlines()[0]
        if error is not None and (isinstance(error, PeerError) or not isinstance(error, SlmError)):
            self._tell(error)
        else:  # other SlmErrors are raised on all ranks alike
            self._closed = True
            self._wake.set()
            self._thread.join()
            self._heartbeats.leave()

    def _tell(self, error: BaseException) -> None:
        """All ranks end with this one: have the thread tell them why.

        Raises:
            PeerError: instead of one, the same with the names of the ranks that are lost.
        """
        self._last_word.acquire()  # for good; if the thread has it, this process is about to end
        self._is_lost = True
        self._wake.set()
        self._explained.wait(20 * self._interval + _WINDOW_SECONDS)
        if isinstance(error, PeerError) and self._verdict is not None:
            raise PeerError(error.field, f"{error.value}; {self._verdict.text}", error.rule, error.fix) from error

    # ---- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self._look()  # once more after the end, to say how it ended
            except StoreSilentError:
                self._look_alone()
            except StoreLostError:
                if not self._closed:
                    self._end_lost(Verdict(ranks=(0,), text="rank 0, which keeps the heartbeats, is gone"))

    def _look(self) -> None:
        """Say where this rank is, and see whether it, or another one, has something to report."""
        self._heartbeats.say(self._record().to_dict())
        moment, limit = self._watched
        elapsed = _since(moment)
        if self._is_lost:
            self._raise_alarm("lost")
        elif elapsed > limit * self._config.watchdog_exit_factor:
            self._raise_alarm("end")
        elif elapsed > limit and moment is not self._reported:
            self._raise_alarm("slow")
        alarm = self._heartbeats.get(f"alarm/{self._num_alarms}")
        if alarm is not None:
            self._answer(alarm)

    def _look_alone(self) -> None:
        """While rank 0 does not answer: it is the one to name where there is something to report."""
        found = Verdict(ranks=(0,), text="rank 0, which keeps the heartbeats, does not answer")
        moment, limit = self._watched
        elapsed = _since(moment)
        if self._is_lost:
            self._end_lost(found)
        elif elapsed > limit * self._config.watchdog_exit_factor:
            self._last_word.acquire(blocking=False)
            self._write_report()
            self._end_hang(self._alarm("end"), found)
        elif elapsed > limit and moment is not self._reported:
            self._reported = moment
            self._write_report()

    def _alarm(self, kind: _Alarm) -> dict[str, Any]:
        moment, limit = self._watched
        what, rule = f"{moment.state.value} of step {moment.step}", f"is reported after {limit:.0f} s"
        return {"kind": kind, "rank": self._rank, "what": what, "rule": rule}

    def _raise_alarm(self, kind: _Alarm) -> None:
        self._heartbeats.offer(f"alarm/{self._num_alarms}", self._alarm(kind))

    def _answer(self, alarm: dict[str, Any]) -> None:
        """What every rank does after the alarm of one."""
        number, self._num_alarms = self._num_alarms, self._num_alarms + 1
        self._reported = self.activity.moment
        if alarm["kind"] != "lost":
            self._write_report()
        if alarm["rank"] == self._rank:
            found = self._read_all(alarm)
            self._heartbeats.offer(f"verdict/{number}", {"ranks": found.ranks, "text": found.text})
        if alarm["kind"] == "slow":
            return
        if alarm["kind"] == "end":  # before others end and this rank's training thread misses them
            self._last_word.acquire(blocking=False)
        given = self._wait_for(f"verdict/{number}")
        found = Verdict(ranks=tuple(given["ranks"]), text=given["text"]) if given else self._without_owner(alarm)
        if alarm["kind"] == "lost":
            self._end_lost(found)
        self._end_hang(alarm, found)

    def _read_all(self, alarm: dict[str, Any]) -> Verdict:
        """Who it is, by what all ranks say; written down where it is about a hang."""
        before = self._records()
        deadline = time.monotonic() + max(2.5 * self._interval, _WINDOW_SECONDS)
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            self._heartbeats.say(self._record().to_dict())
        now = self._records()
        found = verdict(before, now)
        if alarm["kind"] != "lost":
            text = f"{alarm['what']} {alarm['rule']}\nmost likely: {found.text}\n\n{table(now, found)}"
            logger.error("%s takes too long; most likely: %s (%s)", alarm["what"], found.text, self._folder)
            self._append("summary.txt", text)
        return found

    def _records(self) -> list[Record]:
        return [Record(**record) for record in self._heartbeats.all()]

    def _wait_for(self, key: str) -> dict[str, Any] | None:
        deadline = time.monotonic() + 8 * self._interval + 5 * _WINDOW_SECONDS
        while time.monotonic() < deadline:
            self._heartbeats.say(self._record().to_dict())
            if (value := self._heartbeats.get(key)) is not None:
                return value
            time.sleep(self._interval / 4)
        return None

    def _without_owner(self, alarm: dict[str, Any]) -> Verdict:
        rank = int(alarm["rank"])
        return Verdict(ranks=(rank,), text=f"rank {rank} gave an alarm and nothing after it")

    def _end_lost(self, found: Verdict) -> None:
        """End with the error that the training thread has, or with one for it if it never comes to have one."""
        self._verdict = found
        self._linger()
        self._explained.set()
        if self._last_word.acquire(timeout=self._interval):
            doing = self._record().doing
            rule = "has the answer of every other rank it needs within --distributed-timeout-minutes"
            fix = "find out what ended it (its own error, or killed, or out of memory) and resume with --load"
            self._exit(PeerError(f"rank {self._rank}: {doing}", found.text, rule, fix), 1)
        threading.Event().wait()  # the training thread has the last word

    def _end_hang(self, alarm: dict[str, Any], found: Verdict) -> NoReturn:
        self._linger()
        field = f"rank {self._rank}: {alarm['what']}"
        rule = f"ends within --watchdog-exit-factor times its limit ({alarm['rule']})"
        fix = f"read {self._folder}, mend what holds that rank up, and resume with --load; or raise the limits"
        self._exit(PeerError(field, found.text, rule, fix), EXIT_CODE)

    def _linger(self) -> None:
        """Rank 0 keeps the store until the others have read what is in it."""
        if self._rank == 0 and self._heartbeats.size > 1:
            time.sleep(self._interval)

    def _exit(self, error: SlmError, code: int) -> NoReturn:
        """End the process from here: its training thread does not come back."""
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(code)

    # ---- what a rank says of itself ----------------------------------------------------------------------

    def _record(self) -> Record:
        self._beat += 1
        moment, place, waiting_for = self.activity.moment, self.activity.location, self.activity.waiting_for
        if waiting_for is None and is_in_collective():
            waiting_for = "in a collective operation"
        values: dict[str, Any] = {}
        if place is not None:
            values = {"instruction": place.name, "micro_batch": place.micro_batch, "number": place.number}
            values.update(length=place.length, instruction_seconds=time.monotonic() - place.since)
        return Record(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            beat=self._beat,
            phase=moment.state.value,
            step=moment.step,
            phase_seconds=_since(moment),
            waiting_for=waiting_for,
            ended=self._ended,
            stack=main_stack() if moment is self._reported else "",
            **values,
        )

    def _write_report(self) -> None:
        """This rank's place and the stacks of all its threads."""
        record = self._record()
        name = f"rank-{record.rank:03d}.txt"
        self._append(name, f"{record.name}: {record.doing}; {record.waiting_for or 'waits for no other rank'}\n")
        with contextlib.suppress(OSError), (self._folder / name).open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _append(self, name: str, text: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a") as file:
                file.write(f"---- {datetime.now().astimezone().isoformat(timespec='seconds')}\n{text}\n")
        except OSError as error:
            logger.error("%s cannot be written (%s): %s", self._folder / name, error.strerror, text)


def _since(moment: Moment) -> float:
    return time.monotonic() - moment.since
