"""Point-to-point messages between neighboring stages, which keep computing meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.device import SideStream
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import create_message_group
from megatron_slm.parallel.topology import Topology


class Lane(Enum):
    """Kinds of messages, each on process groups of its own so that none waits behind another."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REFERENCE = "reference"


class Channel:
    """One lane between this stage and one neighbor.

    Sends do not block. Receives are posted ahead and waited for by their consumer, in the order of posting, which is
    the sender's order too. No wait outlasts the time-out of the group.
    """

    MAX_SENDS_IN_FLIGHT = 4
    """Beyond this many, a send waits for the oldest, which bounds the memory that unsent tensors hold. It cannot
    deadlock: the schedule is free of circles even if every send blocks."""

    def __init__(self, lane: Lane, group: Any, peer: int, activity: Activity, beside: SideStream) -> None:
        self.lane, self.group, self.peer, self.activity, self.beside = lane, group, peer, activity, beside
        self.sends: deque[tuple[Any, Tensor]] = deque()
        self.receives: deque[tuple[Any, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        """Start sending a tensor, which is kept alive until it is sent.

        Raises:
            PeerError: (as all methods) the peer is gone, or was silent for too long.
        """
        x = x.detach().contiguous()
        self.beside.mark()  # no receive overtakes this send: it could take the last free place on the GPU
        with self._waiting("sending to"):
            self.sends.append((dist.isend(x, self.peer, group=self.group), x))
            while len(self.sends) > self.MAX_SENDS_IN_FLIGHT:
                self.sends.popleft()[0].wait()

    def post_receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Post the receive of the next message."""
        with self._waiting("receiving from"), self.beside.after_mark():
            buffer = torch.empty(shape, dtype=dtype, device=device)
            self.receives.append((dist.irecv(buffer, self.peer, group=self.group), buffer))

    def receive(self) -> Tensor:
        """Wait for the oldest posted message."""
        handle, buffer = self.receives.popleft()
        with self._waiting("receiving from"):
            handle.wait()
        self.beside.hand_over(buffer)
        return buffer

    def flush(self) -> None:
        """Wait until all sends are done."""
        with self._waiting("sending to"):
            while self.sends:
                self.sends.popleft()[0].wait()
        self.beside.mark()  # receives of what follows do not run beside what was done before

    @contextmanager
    def _waiting(self, doing: str) -> Iterator[None]:
        channel = f"{doing} rank {self.peer}, {self.lane.value} lane"
        with translate_peer_errors(channel), self.activity.waiting(channel):
            yield


class Channels:
    """This stage's channels to and from the next and the previous stage, on each lane.

    Each lane is used once at start, in its own direction, because the first use opens its transport and blocks
    meanwhile. Pairs of stages begin side by side, (0, 1), (2, 3), ... and then (1, 2), (3, 4), ...: the start takes as
    long as two of them, however long the pipeline.

    On a GPU NCCL starts a message's kernel only after everything computed so far on the stream that issues it. A
    receive is therefore issued from a stream of its own, which waits for what came before the computation that is
    running: the message arrives beside that computation, and its kernel waits for it no longer than that.
    """

    def __init__(
        self, topology: Topology, rank: int, device: torch.device, lanes: Sequence[Lane], activity: Activity
    ) -> None:
        self.next: dict[Lane, Channel] = {}
        self.previous: dict[Lane, Channel] = {}
        self._beside = SideStream()
        for first_stage in (0, 1):
            pairs = topology.neighbors(first_stage)
            if not pairs:
                continue
            pair = next((pair for pair in pairs if rank in pair), None)
            for lane in lanes:
                group = create_message_group(pairs)
                if pair is not None:
                    self._open(lane, group, pair, rank, device, activity)

    def _open(
        self, lane: Lane, group: Any, pair: Sequence[int], rank: int, device: torch.device, activity: Activity
    ) -> None:
        """Make this rank's end of a channel and pass a first message through it."""
        low, high = pair
        is_low = rank == low
        channel = Channel(lane, group, high if is_low else low, activity, self._beside)
        (self.next if is_low else self.previous)[lane] = channel
        if is_low == (lane is Lane.BACKWARD):
            dist.recv(torch.zeros(1, device=device), channel.peer, group=group)
        else:
            dist.send(torch.zeros(1, device=device), channel.peer, group=group)

    def before_computation(self) -> None:
        """Note that a computation starts: receives that are posted from now on may run beside it."""
        self._beside.mark()

    def flush(self) -> None:
        """Wait until all sends are done."""
        for channel in (*self.next.values(), *self.previous.values()):
            channel.flush()
