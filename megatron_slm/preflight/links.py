"""Measures latency, bandwidth and clock offsets between pairs of ranks, in rounds of disjoint pairs.

Between nodes, the first rank of each node is paired with those of the others, one partner per round; inside a node,
neighboring ranks are paired. Each direction of a pair is measured separately.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.device import local_device, synchronize
from megatron_slm.parallel.collectives import all_gather_objects

Pair = tuple[int, int]

_FIRST_BYTES, _MAX_BYTES = 64 << 10, 256 << 20
_NUM_PINGS = 20
_DONE, _PING = 0, -1
"""Messages in place of the number of bytes of a block to come."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a pair of ranks."""

    source: int
    target: int
    bytes_per_second: float
    latency_seconds: float
    """Half the shortest round trip."""
    clock_offset_seconds: float
    """The target's clock minus the source's, in the middle of that round trip."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements of all ranks."""

    links: list[Link]
    all_reduce_bytes_per_second: float | None
    """Bus bandwidth of one all-reduce over all ranks; None for a single rank."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)


def rounds(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Return rounds of pairs of ranks to measure at once: in a round, no rank has two partners.

    First a round-robin tournament of the nodes' first ranks (circle method), then neighbors inside the nodes.

    Args:
        nodes: ranks of each node.
    """
    leaders: list[int | None] = [ranks[0] for ranks in nodes]
    if len(leaders) % 2:
        leaders.append(None)  # its partner has no pair in this round
    found: list[list[Pair]] = []
    for _ in range(len(leaders) - 1):
        half = len(leaders) // 2
        partners = zip(leaders[:half], reversed(leaders[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in partners if a is not None and b is not None])
        leaders = [leaders[0], leaders[-1], *leaders[1:-1]]
    for parity in (0, 1):
        inside = [(a, b) for ranks in nodes for a, b in zip(ranks[parity::2], ranks[parity + 1 :: 2], strict=False)]
        found.append(inside)
    return [pairs for pairs in found if pairs]


def measure(nodes: Sequence[Sequence[int]], *, seconds: float) -> Measurements:
    """Measure all links. Collective over the world.

    Args:
        nodes: ranks of each node.
        seconds: approximate time for each direction of a link.
    """
    rank, mine = dist.get_rank(), []
    group = dist.new_group()  # a separate one, so that NCCL's buffers for every pair are freed before training
    try:
        for pairs in rounds(nodes):
            for low, high in pairs:
                for source, target in ((low, high), (high, low)):
                    if rank == source:
                        mine.append(_measure_to(_Peer(target, group), seconds))
                    elif rank == target:
                        _serve(_Peer(source, group))
            dist.barrier(group)  # keep rounds apart
        links = [link for of_rank in all_gather_objects(mine, group) for link in of_rank]
        return Measurements(links=links, all_reduce_bytes_per_second=_all_reduce_rate(group, seconds))
    finally:
        dist.destroy_process_group(group)


class _Peer:
    """The rank at the other end of a link."""

    def __init__(self, rank: int, group: Any) -> None:
        self.rank, self.group = rank, group

    def send_number(self, number: int) -> None:
        """Send an integer."""
        self.send(torch.tensor([number], dtype=torch.int64, device=local_device()))

    def receive_number(self) -> int:
        """Receive an integer."""
        held = torch.empty(1, dtype=torch.int64, device=local_device())
        dist.recv(held, self.rank, group=self.group)
        return int(held)

    def send(self, x: Tensor) -> None:
        """Send a tensor."""
        dist.send(x, self.rank, group=self.group)

    def receive_bytes(self, size: int) -> None:
        """Receive a tensor of `size` bytes and discard it."""
        dist.recv(torch.empty(size, dtype=torch.uint8, device=local_device()), self.rank, group=self.group)
        synchronize()

    def ping(self) -> int:
        """Return the peer's time, in nanoseconds."""
        self.send_number(_PING)
        return self.receive_number()


def _measure_to(target: _Peer, seconds: float) -> Link:
    trips: list[tuple[int, int]] = []
    target.ping()  # opens the connection
    for _ in range(_NUM_PINGS):
        sent = time.time_ns()
        answered = target.ping()
        back = time.time_ns()
        trips.append((back - sent, answered - (sent + back) // 2))
        if sum(trip for trip, _ in trips) > seconds * 1e9 / 4:
            break
    trip, offset = min(trips)
    rate, size, left = 0.0, _FIRST_BYTES, seconds
    while left > 0:
        took = _send_block(target, size)
        rate, left = max(rate, size / took), left - took
        size = int(min(_MAX_BYTES, max(size, rate * left / 2)))
    target.send_number(_DONE)
    return Link(
        source=dist.get_rank(),
        target=target.rank,
        bytes_per_second=rate,
        latency_seconds=trip / 2e9,
        clock_offset_seconds=offset / 1e9,
    )


def _serve(source: _Peer) -> None:
    """Answer the messages of the peer's `_measure_to`."""
    while (message := source.receive_number()) != _DONE:
        if message == _PING:
            source.send_number(time.time_ns())
        else:
            source.receive_bytes(message)
            source.send_number(message)


def _send_block(target: _Peer, size: int) -> float:
    """Return the seconds from sending a block of `size` bytes to its acknowledgment."""
    block = torch.empty(size, dtype=torch.uint8, device=local_device())
    synchronize()
    started = time.perf_counter()
    target.send_number(size)
    target.send(block)
    target.receive_number()
    return time.perf_counter() - started


def _all_reduce_rate(group: Any, seconds: float) -> float | None:
    """Return the best bus bandwidth over growing sizes, in bytes per second; rank 0 decides the next size."""
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        return None
    best, size, left = 0.0, _FIRST_BYTES, seconds
    while size:
        numbers = torch.zeros(size // 4, dtype=torch.float32, device=local_device())
        dist.barrier(group)
        synchronize()
        started = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        synchronize()
        took = time.perf_counter() - started
        best, left = max(best, 2 * (num_ranks - 1) / num_ranks * size / took), left - took
        is_last = left <= 0 or size >= _MAX_BYTES or 4 * took > left
        next_size = torch.tensor([0 if is_last else 4 * size], device=local_device())
        dist.broadcast(next_size, 0, group=group)
        size = int(next_size)
    return best
