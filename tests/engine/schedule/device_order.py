"""Programs run as GPUs would run them: streams, messages that meet (NCCL), and few places for their kernels.

What each rank's device is told is recorded from the engine's own `Channel`s, over stand-ins for torch.distributed and
the side stream. A send's kernel may start once everything computed before it is over; a receive's, once everything
before the side stream's mark is; both in the order of their stream. A kernel ends when its peer's kernel runs too. A
wait holds the computing stream up. At most `places` kernels of messages run on a device at once, and of those that
could start, the one that was issued first does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from megatron_slm.engine.schedule.costs import Work
from megatron_slm.engine.schedule.programs import Instruction, Kind, Schedule, forward_programs
from megatron_slm.parallel import channels
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.channels import Channel, Lane

_SENDS = {Kind.SEND_ACTIVATION: Lane.FORWARD, Kind.SEND_GRADIENT: Lane.BACKWARD, Kind.SEND_REFERENCE_ACTIVATION: Lane.REFERENCE}  # fmt: skip
_RECEIVES = {Kind.RECV_ACTIVATION: Lane.FORWARD, Kind.RECV_GRADIENT: Lane.BACKWARD, Kind.RECV_REFERENCE_ACTIVATION: Lane.REFERENCE}  # fmt: skip
_COMPUTES = {Kind.FORWARD: Lane.FORWARD, Kind.BACKWARD: Lane.BACKWARD, Kind.REFERENCE_FORWARD: Lane.REFERENCE}
Part = Sequence[Sequence[Instruction]]
"""Every stage's program of a step, a prologue or an evaluation."""


class Message(NamedTuple):
    """A send or a receive, as it was issued."""

    rank: int
    stream: tuple[Lane, int]
    """Lane and peer."""
    after: int
    """How much of the computing stream must be over before its kernel starts."""
    meets: tuple[Any, ...]
    """Equal for a send and its receive."""


@dataclass
class Tape:
    """What one device is told: the computing stream's work, in order."""

    computing: list[tuple[str, int]] = field(default_factory=list)
    """("compute", micro-batch), ("wait", message) or ("barrier", number)."""
    issued: list[tuple[str, int]] = field(default_factory=list)
    """("message", number) and ("barrier", number), in the host's order."""


def parts_of(schedule: Schedule) -> list[Part]:
    """A short run: prologue, two steps with an evaluation between them, the last step."""
    evaluation = forward_programs(Work.FORWARD, schedule.num_stages, schedule.num_micro_batches)
    return [schedule.prologue, schedule.step, evaluation, schedule.last]


class Devices:
    """Every rank's work, recorded."""

    def __init__(self, parts: Sequence[Part], *, receive_early: bool = True) -> None:
        self.num_ranks, self._receive_early = len(parts[0]), receive_early
        self.tapes = [Tape() for _ in range(self.num_ranks)]
        self.messages: list[Message] = []
        for rank in range(self.num_ranks):
            self._record(rank, [part[rank] for part in parts])
        met: dict[Any, list[int]] = defaultdict(list)
        for number, message in enumerate(self.messages):
            met[message.meets].append(number)
        self.peer = {}
        for pair in met.values():
            assert len(pair) == 2, f"a message without its other end: {[self.messages[n] for n in pair]}"
            self.peer.update({pair[0]: pair[1], pair[1]: pair[0]})

    def _record(self, rank: int, programs: Sequence[Sequence[Instruction]]) -> None:
        computing = self.tapes[rank].computing
        count: dict[Any, int] = defaultdict(int)
        beside = _Beside(computing)

        def issue(peer: int, lane: Lane, after: int, ends: tuple[int, int]) -> Any:
            number = len(self.messages)
            order = count[peer, lane]
            count[peer, lane] += 1
            self.tapes[rank].issued.append(("message", number))
            self.messages.append(Message(rank, (lane, peer), after, (lane, ends, order)))
            return mock.Mock(wait=lambda: computing.append(("wait", number)))

        def isend(x: Any, peer: int, group: Lane) -> Any:
            return issue(peer, group, len(computing), (min(rank, peer), max(rank, peer)))

        def irecv(x: Any, peer: int, group: Lane) -> Any:
            assert beside.is_inside, "a receive is issued from the side stream"
            after = beside.marked if self._receive_early else len(computing)
            return issue(peer, group, after, (min(rank, peer), max(rank, peer)))

        def channel(lane: Lane, peer: int) -> Channel:
            return Channel(lane, lane, peer, Activity(), beside)  # type: ignore[arg-type]

        next_, previous = ({lane: channel(lane, rank + d) for lane in Lane} for d in (1, -1))
        with mock.patch.object(channels, "dist", mock.Mock(isend=isend, irecv=irecv)):
            for program in programs:
                for kind, micro_batch in program:
                    if kind in _SENDS:
                        lane = _SENDS[kind]
                        (previous if lane is Lane.BACKWARD else next_)[lane].send(torch.empty(0))
                    elif kind in _RECEIVES:
                        lane = _RECEIVES[kind]
                        source = (next_ if lane is Lane.BACKWARD else previous)[lane]
                        source.post_receive((0,), torch.float32, torch.device("cpu"))
                    elif kind in _COMPUTES:
                        lane = _COMPUTES[kind]
                        is_source = rank == (self.num_ranks - 1 if lane is Lane.BACKWARD else 0)
                        if not is_source:
                            (next_ if lane is Lane.BACKWARD else previous)[lane].receive()
                        beside.mark()
                        computing.append(("compute", micro_batch))
                    elif kind is Kind.OPTIMIZER_STEP:
                        computing.append(("barrier", count["barrier"]))
                        self.tapes[rank].issued.append(computing[-1])
                        count["barrier"] += 1
                for one in (*next_.values(), *previous.values()):
                    one.flush()

    def blocking(self) -> str | None:
        """Run with a host that waits at each message until its peer is at the other end; None, or what is stuck.

        It is what CUDA_LAUNCH_BLOCKING, transports opened late and allocations that synchronize do.
        """
        order = [tape.issued for tape in self.tapes]
        at, moved = [0] * self.num_ranks, True
        while moved:
            moved = False
            for rank in range(self.num_ranks):
                while at[rank] < len(order[rank]) and self._passes(rank, order, at):
                    moved = True
        stuck = [order[r][at[r]] for r in range(self.num_ranks) if at[r] < len(order[r])]
        return None if not stuck else f"stuck at {stuck}"

    def _passes(self, rank: int, order: list[list[tuple[str, int]]], at: list[int]) -> bool:
        kind, number = order[rank][at[rank]]
        if kind == "barrier":
            if not all(at[r] < len(order[r]) and order[r][at[r]] == (kind, number) for r in range(self.num_ranks)):
                return False
            for r in range(self.num_ranks):
                at[r] += 1
            return True
        peer = self.peer[number]
        other = self.messages[peer].rank
        if at[other] < len(order[other]) and order[other][at[other]] == ("message", peer):
            at[rank] += 1
            at[other] += 1
            return True
        return False

    def run(self, places: int, choose: Callable[[list[int]], int] = min, *, slow: bool = False) -> str | None:
        """Run with `places` for kernels of messages on each device; None where all ends, else what is stuck.

        Args:
            choose: of the messages that could start, the next one; the first that was issued.
            slow: a computation is over only when no message can start beside it; else at once.
        """
        state = _State(self)
        while True:
            state.settle(computes=not slow)
            ready = [
                n for rank in range(self.num_ranks) if len(state.running[rank]) < places for n in state.ready(rank)
            ]
            if not ready:
                if slow and state.compute():
                    continue
                return state.stuck()
            started = choose(ready)
            state.running[self.messages[started].rank].add(started)


class _Beside:
    """Stands for the side stream: remembers how long the computing stream was at the mark."""

    def __init__(self, computing: list[Any]) -> None:
        self._computing, self.marked, self.is_inside = computing, 0, False

    def mark(self) -> None:
        self.marked = len(self._computing)

    @contextmanager
    def after_mark(self) -> Iterator[None]:
        self.is_inside = True
        yield
        self.is_inside = False

    def hand_over(self, x: torch.Tensor) -> None:
        assert not self.is_inside


class _State:
    """How far all devices are."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.at = [0] * devices.num_ranks
        self.done = [False] * len(devices.messages)
        self.running: list[set[int]] = [set() for _ in range(devices.num_ranks)]
        self._streams: list[dict[Any, deque[int]]] = [defaultdict(deque) for _ in range(devices.num_ranks)]
        for number, message in enumerate(devices.messages):
            self._streams[message.rank][message.stream].append(number)

    def settle(self, *, computes: bool) -> None:
        """Let everything pass that needs no place: messages that met, waits for them, barriers, and computations."""
        moved = True
        while moved:
            moved = self._meet()
            for rank in range(self.devices.num_ranks):
                while self._passes(rank, computes=computes):
                    self.at[rank] += 1
                    moved = True
            moved |= self._pass_barrier()

    def compute(self) -> bool:
        """End one computation, of the first rank that has one; False where none has."""
        for rank in range(self.devices.num_ranks):
            if self._passes(rank, computes=True):
                self.at[rank] += 1
                return True
        return False

    def _passes(self, rank: int, *, computes: bool) -> bool:
        """Tell whether the computing stream's next piece of work is over as soon as it is reached."""
        computing = self.devices.tapes[rank].computing
        if self.at[rank] == len(computing):
            return False
        kind, number = computing[self.at[rank]]
        return self.done[number] if kind == "wait" else kind == "compute" and computes

    def _meet(self) -> bool:
        moved = False
        for rank, running in enumerate(self.running):
            for number in list(running):
                peer = self.devices.peer[number]
                other = self.running[self.devices.messages[peer].rank]
                if peer in other:
                    self.running[rank].discard(number)
                    other.discard(peer)
                    self.done[number] = self.done[peer] = moved = True
        return moved

    def _pass_barrier(self) -> bool:
        """An all-reduce over the world: every computing stream is at it."""
        here = [
            tape.computing[at] if at < len(tape.computing) else ("end", 0)
            for tape, at in zip(self.devices.tapes, self.at, strict=True)
        ]
        if here[0][0] != "barrier" or any(one != here[0] for one in here):
            return False
        self.at = [at + 1 for at in self.at]
        return True

    def ready(self, rank: int) -> list[int]:
        """Messages of a rank whose kernels could start."""
        found = []
        for stream in self._streams[rank].values():
            while stream and self.done[stream[0]]:
                stream.popleft()
            if (
                stream
                and stream[0] not in self.running[rank]
                and self.devices.messages[stream[0]].after <= self.at[rank]
            ):
                found.append(stream[0])
        return found

    def stuck(self) -> str | None:
        """What nothing moves any more; None where all is over."""
        tapes = self.devices.tapes
        if all(self.done) and all(at == len(tape.computing) for at, tape in zip(self.at, tapes, strict=True)):
            return None
        places = [
            tape.computing[at] if at < len(tape.computing) else "end" for tape, at in zip(tapes, self.at, strict=True)
        ]
        running = [sorted(self.devices.messages[n].meets[0].value for n in one) for one in self.running]
        return f"ranks are at {places}; kernels running: {running}"
