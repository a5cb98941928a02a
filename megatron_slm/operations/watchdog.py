"""Watchdog thread: detects a stalled step, names the rank that holds the run up, and ends the run.

Two limits. When the training loop exceeds the first, every rank writes its stacks and its position in the schedule, and
one rank diagnoses the hang from the records of all. After `--watchdog-exit-factor` times the limit they do so again and
exit. If a rank is lost (a closed connection, or a wait that timed out), there is no limit: all ranks learn of it at
once, name the lost rank, and exit.

On NCCL no wait times out in Python, and its own thread would end the process without a report: the watchdog ends a
wait for another rank after --distributed-timeout-minutes, a little earlier than NCCL.

The ranks communicate through a store of their own (`heartbeats.py`), because collectives hang.
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
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch.distributed as dist

from megatron_slm.config.resilience import ResilienceConfig
from megatron_slm.errors import PeerError, SlmError
from megatron_slm.log import print_traceback
from megatron_slm.operations.device_waits import waits_on_device
from megatron_slm.operations.hang_report import Diagnosis, Record, diagnose, is_in_collective, main_stack, table
from megatron_slm.operations.heartbeats import Heartbeats, StoreLostError, StoreSilentError
from megatron_slm.operations.silent_peers import SilentPeers
from megatron_slm.parallel.activity import Activity, LoopState, Moment
from megatron_slm.parallel.meeting import rounds_waited

logger = logging.getLogger(__name__)

EXIT_CODE = 3
"""Exit code of a run that the watchdog ended because of a hang."""
FOLDER = "hang"
"""Folder of the reports, in the run's folder."""
_NUM_DURATIONS = 3
"""Number of durations needed for a median."""
_LAST_RESORT_SECONDS = 60.0
"""Time after the second limit at which a process that never runs this thread is ended."""
_RESPONSE_SECONDS = 2.0
"""Minimum time for a live rank to publish a record, on a busy machine too."""
_AlarmKind = Literal["slow", "end", "wait", "lost"]


@dataclass(frozen=True, kw_only=True)
class _Alarm:
    """One rank's call to all ranks: its loop exceeded the first limit (slow) or the second (end), its wait for another
    rank the longest one (wait), or a rank is lost."""

    kind: _AlarmKind
    rank: int
    activity: str
    limit_seconds: float


class Watchdog:
    """Watches this rank's training from `__enter__` to `__exit__`; does nothing with --watchdog-factor 0.

    Collective over the world.
    """

    def __init__(
        self, activity: Activity, config: ResilienceConfig, run_dir: Path, *, longest_wait_seconds: float | None = None
    ) -> None:
        """Prepare it.

        Args:
            longest_wait_seconds: of a wait for another rank; None where the communication library raises in time.
        """
        self.activity, self._config, self._folder = activity, config, run_dir / FOLDER
        self.enabled = config.watchdog_factor > 0
        self._interval = max(min(1.0, config.watchdog_min_seconds / 4), dist.get_world_size() / 500)
        self._watched = activity.moment, 60 * config.watchdog_allowance_minutes
        """The loop's moment and its limit in seconds, replaced as one."""
        self._rank, self._host = dist.get_rank(), socket.gethostname()
        self._beat, self._num_alarms = 0, 0
        self._ended: str | None = None
        self._silent_peers = SilentPeers()
        self._longest_wait_seconds = longest_wait_seconds
        self._wait: tuple[object, float] | None = None
        """The position at which this rank waits for another, and since when."""
        self._is_lost = False
        self._reported: Moment | None = None
        self._wake, self._closed, self._explained = threading.Event(), False, threading.Event()
        self._diagnosis: Diagnosis | None = None
        self._may_exit = threading.Lock()
        """Held by the thread that ends the process: the training thread with its error, or the watchdog's."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ---- called by the training thread ------------------------------------------------------------------

    def enter(self, state: LoopState, step: int) -> None:
        """Record that the loop enters a state, and set its limit."""
        before = self.activity.moment
        if before is self._reported:
            logger.warning("%s finished after %.0f s", _describe(before), _seconds_since(before))
        self.activity.enter(state, step)
        if not self.enabled:
            return
        config, durations = self._config, self.activity.durations[state]
        limit = 60 * config.watchdog_allowance_minutes
        if state in (LoopState.STEP, LoopState.EVALUATION) and len(durations) >= _NUM_DURATIONS:
            limit = max(config.watchdog_min_seconds, config.watchdog_factor * median(durations))
        self._watched = self.activity.moment, limit
        # a C thread that needs no interpreter, for a call that hangs while it holds the interpreter's lock
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
        if error is not None and not isinstance(error, SlmError | SystemExit | KeyboardInterrupt):
            print_traceback(error)  # the diagnosis takes seconds, and a launcher may end this process meanwhile
        if error is not None and (isinstance(error, PeerError) or not isinstance(error, SlmError)):
            self._report_lost(error)
        else:  # all ranks raise the other SlmErrors
            self._closed = True
            self._wake.set()
            self._thread.join()
            self._heartbeats.leave()

    def _report_lost(self, error: BaseException) -> None:
        """Have the watchdog thread tell the other ranks of an error that ends all of them.

        Raises:
            PeerError: the given one, if it is a PeerError, with the diagnosis added.
        """
        self._may_exit.acquire()  # never released; if the watchdog thread holds it, the process is about to end
        self._is_lost = True
        self._wake.set()
        self._explained.wait(20 * self._interval + _RESPONSE_SECONDS)
        if isinstance(error, PeerError) and self._diagnosis is not None:
            raise PeerError(error.field, f"{error.value}; {self._diagnosis.text}", error.rule, error.fix) from error

    # ---- the watchdog thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self._check()  # once more after the end, to publish the final record
            except StoreSilentError:
                self._check_alone()
            except StoreLostError:
                if not self._closed:
                    self._exit_lost(Diagnosis(ranks=(0,), text="rank 0, which hosts the heartbeats, is gone"))

    def _check(self) -> None:
        """Publish this rank's record, raise an alarm if there is reason, and answer the alarm of any rank."""
        self._heartbeats.publish(self._record().to_dict())
        if self._rank == 0 and self._silent_peers.found(self._records, time.monotonic()):
            self._is_lost = True
        moment, limit = self._watched
        kind = self._due_alarm(moment, limit)
        if kind == "wait":
            limit = self._longest_wait_seconds or 0.0
        if kind is not None:
            self._heartbeats.set_once(f"alarm/{self._num_alarms}", asdict(self._alarm(kind, moment, limit)))
        alarm = self._heartbeats.get(f"alarm/{self._num_alarms}")
        if alarm is not None:
            self._answer(_Alarm(**alarm))

    def _check_alone(self) -> None:
        """Check while rank 0 does not respond, which is then the diagnosis."""
        found = Diagnosis(ranks=(0,), text="rank 0, which hosts the heartbeats, does not respond")
        moment, limit = self._watched
        kind = self._due_alarm(moment, limit)
        if kind == "lost":
            self._exit_lost(found)
        elif kind in ("end", "wait"):
            self._may_exit.acquire(blocking=False)
            self._write_report()
            self._exit_hang(self._alarm(kind, moment, limit), found)
        elif kind == "slow":
            self._reported = moment
            self._write_report()

    def _due_alarm(self, moment: Moment, limit: float) -> _AlarmKind | None:
        elapsed = _seconds_since(moment)
        if self._is_lost:
            return "lost"
        if self._longest_wait_seconds is not None and self._seconds_waited() > self._longest_wait_seconds:
            return "wait"
        if elapsed > limit * self._config.watchdog_exit_factor:
            return "end"
        return "slow" if elapsed > limit and moment is not self._reported else None

    def _seconds_waited(self) -> float:
        """Return how long this rank has waited for another one at the same place, without a sign that it works."""
        now, position = time.monotonic(), (self.activity.moment, self.activity.location, rounds_waited())
        if self._waiting_for() is None:
            self._wait = None
        elif self._wait is None or self._wait[0] != position:
            self._wait = position, now
        return 0.0 if self._wait is None else now - self._wait[1]

    def _alarm(self, kind: _AlarmKind, moment: Moment, limit: float) -> _Alarm:
        return _Alarm(kind=kind, rank=self._rank, activity=_describe(moment), limit_seconds=limit)

    def _answer(self, alarm: _Alarm) -> None:
        """Respond to an alarm: all ranks report, the one that raised it diagnoses, and all exit unless it is "slow"."""
        number, self._num_alarms = self._num_alarms, self._num_alarms + 1
        self._reported = self.activity.moment
        if alarm.kind != "lost":
            self._write_report()
        if alarm.rank == self._rank:
            self._heartbeats.set_once(f"diagnosis/{number}", asdict(self._diagnose(alarm)))
        if alarm.kind == "slow":
            return
        if alarm.kind in ("end", "wait"):  # before other ranks exit and this rank's training thread notices
            self._may_exit.acquire(blocking=False)
        found = self._await_diagnosis(number, alarm)
        if alarm.kind == "lost":
            self._exit_lost(found)
        self._exit_hang(alarm, found)

    def _diagnose(self, alarm: _Alarm) -> Diagnosis:
        """Diagnose from two rounds of all ranks' records; log and write the result if it is about a hang."""
        before = self._records()
        deadline = time.monotonic() + max(2.5 * self._interval, _RESPONSE_SECONDS)
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            self._heartbeats.publish(self._record().to_dict())
        now = self._records()
        found = diagnose(before, now)
        if alarm.kind != "lost":
            what = f"rank {alarm.rank}'s wait, {alarm.activity}," if alarm.kind == "wait" else alarm.activity
            headline = f"{what} exceeded its limit of {alarm.limit_seconds:.0f} s"
            logger.error("%s; most likely cause: %s (reports in %s)", headline, found.text, self._folder)
            self._append("summary.txt", f"{headline}\nmost likely cause: {found.text}\n\n{table(now, found)}")
        return found

    def _records(self) -> list[Record]:
        return [Record(**record) for record in self._heartbeats.records()]

    def _await_diagnosis(self, number: int, alarm: _Alarm) -> Diagnosis:
        """Wait for the diagnosis by the rank that raised the alarm; without one, that rank is the diagnosis."""
        deadline = time.monotonic() + 8 * self._interval + 5 * _RESPONSE_SECONDS
        while time.monotonic() < deadline:
            self._heartbeats.publish(self._record().to_dict())
            if (found := self._heartbeats.get(f"diagnosis/{number}")) is not None:
                return Diagnosis(ranks=tuple(found["ranks"]), text=found["text"])
            time.sleep(self._interval / 4)
        return Diagnosis(ranks=(alarm.rank,), text=f"rank {alarm.rank} raised an alarm and then stopped responding")

    def _exit_lost(self, found: Diagnosis) -> None:
        """Exit with the training thread's error, or with one for it if it does not raise one."""
        self._diagnosis = found
        self._linger()
        self._explained.set()
        if self._may_exit.acquire(timeout=self._interval):
            doing = self._record().doing
            rule = "receive answers from all its peers within --distributed-timeout-minutes"
            fix = "find what ended that rank (its own error, killed, out of memory) and resume with --load"
            self._exit(PeerError(f"rank {self._rank}: {doing}", f"interrupted; {found.text}", rule, fix), 1)
        threading.Event().wait()  # the training thread ends the process

    def _exit_hang(self, alarm: _Alarm, found: Diagnosis) -> NoReturn:
        self._linger()
        field = f"rank {self._rank}: {alarm.activity}"
        rule = f"finish within --watchdog-exit-factor times its limit of {alarm.limit_seconds:.0f} s"
        if alarm.kind == "wait":
            rule = "receive answers from all its peers within --distributed-timeout-minutes"
        fix = f"read {self._folder}, repair the cause and resume with --load; or raise the limits"
        self._exit(PeerError(field, f"held up; {found.text}", rule, fix), EXIT_CODE)

    def _linger(self) -> None:
        """Keep the store, on rank 0, until the other ranks have read it."""
        if self._rank == 0 and self._heartbeats.size > 1:
            time.sleep(self._interval)

    def _exit(self, error: SlmError, code: int) -> NoReturn:
        """End the process from this thread, because the training thread hangs."""
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(code)

    # ---- this rank's record --------------------------------------------------------------------------------

    def _record(self) -> Record:
        self._beat += 1
        moment, location, waiting_for = self.activity.moment, self.activity.location, self._waiting_for()
        values: dict[str, Any] = {}
        if location is not None:
            values = {"instruction": location.name, "micro_batch": location.micro_batch, "number": location.number}
            values.update(length=location.length, instruction_seconds=time.monotonic() - location.since)
        return Record(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            beat=self._beat,
            state=moment.state.value,
            step=moment.step,
            state_seconds=_seconds_since(moment),
            waiting_for=waiting_for,
            ended=self._ended,
            stack=main_stack() if moment is self._reported else "",
            **values,
        )

    def _waiting_for(self) -> str | None:
        """Return what this rank waits for; None where it waits for no other rank."""
        waiting_for = self.activity.waiting_for
        if waiting_for is None and is_in_collective():
            waiting_for = "in a collective operation"
        return waiting_for or waits_on_device()

    def _write_report(self) -> None:
        """Append this rank's record and the stacks of all its threads to its file."""
        record = self._record()
        name = f"rank-{record.rank:03d}.txt"
        self._append(name, f"{record.name}: {record.doing}; {record.waits}\n")
        with contextlib.suppress(OSError), (self._folder / name).open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _append(self, name: str, text: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a") as file:
                file.write(f"---- {datetime.now().astimezone().isoformat(timespec='seconds')}\n{text}\n")
        except OSError as error:
            logger.error("cannot write %s (%s): %s", self._folder / name, error.strerror, text)


def _describe(moment: Moment) -> str:
    return f"{moment.state.value} at step {moment.step}"


def _seconds_since(moment: Moment) -> float:
    return time.monotonic() - moment.since
