"""Latency, bandwidth and clocks: measured between pairs of ranks, all pairs that share no node at once.

Pairs are measured in rounds. Between nodes the first rank of each speaks for it, and in every round each node has one
partner; inside a node neighbouring ranks are paired. Each direction of a pair is timed by itself.
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

_FIRST_BYTES, _MOST_BYTES = 64 << 10, 256 << 20
_NUM_PINGS = 20


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction between two ranks."""

    source: int
    target: int
    bytes_per_second: float
    latency_seconds: float
    """Half of the shortest round trip."""
    clock_offset_seconds: float
    """The target's clock minus the source's, in the middle of that round trip."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Of the whole world."""

    links: list[Link]
    all_reduce_bytes_per_second: float | None
    """Bus bandwidth: what each rank's link carries while all ranks sum one tensor; None for a world of one."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def rounds(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Which pairs are measured together.

    Args:
        nodes: the ranks of each node.

    Returns:
        rounds of pairs that share no rank: first all pairs of nodes (of which each has one partner a round), by their
        first ranks; then neighbours inside the nodes, as in a ring.
    """
    leaders: list[int | None] = [ranks[0] for ranks in nodes]
    if len(leaders) % 2:
        leaders.append(None)  # who meets nobody rests
    found: list[list[Pair]] = []
    for _ in range(len(leaders) - 1):
        half = len(leaders) // 2
        met = zip(leaders[:half], reversed(leaders[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        leaders = [leaders[0], leaders[-1], *leaders[1:-1]]
    for parity in (0, 1):
        inside = [(a, b) for ranks in nodes for a, b in zip(ranks[parity::2], ranks[parity + 1 :: 2], strict=False)]
        found.append(inside)
    return [pairs for pairs in found if pairs]


def measure(nodes: Sequence[Sequence[int]], *, seconds: float) -> Measurements:
    """Measure all links. Collective over the world.

    Args:
        nodes: the ranks of each node.
        seconds: for each direction of a link, about.
    """
    rank, mine = dist.get_rank(), []
    group = dist.new_group()  # its own, so that what NCCL keeps for every pair is freed before training
    try:
        for pairs in rounds(nodes):
            for low, high in pairs:
                for source, target in ((low, high), (high, low)):
                    if rank == source:
                        mine.append(_measure_to(_End(target, group), seconds))
                    elif rank == target:
                        _answer(_End(source, group))
            dist.barrier(group)  # rounds do not disturb each other
        links = [link for of_rank in all_gather_objects(mine, group) for link in of_rank]
        return Measurements(links=links, all_reduce_bytes_per_second=_all_reduce_rate(group, seconds))
    finally:
        dist.destroy_process_group(group)


class _End:
    """The other end of a link."""

    def __init__(self, rank: int, group: Any) -> None:
        self.rank, self.group = rank, group

    def tell(self, number: int) -> None:
        """Send a number."""
        self.send(torch.tensor([number], dtype=torch.int64, device=local_device()))

    def hear(self) -> int:
        """Wait for a number."""
        held = torch.empty(1, dtype=torch.int64, device=local_device())
        dist.recv(held, self.rank, group=self.group)
        return int(held)

    def send(self, x: Tensor) -> None:
        """Send a tensor."""
        dist.send(x, self.rank, group=self.group)

    def receive_bytes(self, size: int) -> None:
        """Wait for a tensor, and drop it."""
        dist.recv(torch.empty(size, dtype=torch.uint8, device=local_device()), self.rank, group=self.group)
        synchronize()

    def ping(self) -> int:
        """Ask for the time there, in nanoseconds."""
        self.tell(-1)
        return self.hear()


def _measure_to(target: _End, seconds: float) -> Link:
    trips: list[tuple[int, int]] = []
    target.ping()  # connections are made on first use
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
        size = int(min(_MOST_BYTES, max(size, rate * left / 2)))
    target.tell(0)
    return Link(
        source=dist.get_rank(),
        target=target.rank,
        bytes_per_second=rate,
        latency_seconds=trip / 2e9,
        clock_offset_seconds=offset / 1e9,
    )


def _answer(source: _End) -> None:
    """The other end of `_measure_to`."""
    while (size := source.hear()) != 0:
        if size == -1:
            source.tell(time.time_ns())
        else:
            source.receive_bytes(size)
            source.tell(size)


def _send_block(target: _End, size: int) -> float:
    """Seconds until a block has arrived there, and word of it here."""
    block = torch.empty(size, dtype=torch.uint8, device=local_device())
    synchronize()
    started = time.perf_counter()
    target.tell(size)
    target.send(block)
    target.hear()
    return time.perf_counter() - started


def _all_reduce_rate(group: Any, seconds: float) -> float | None:
    """Best over growing sizes; rank 0 says when it is enough."""
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
        enough = left <= 0 or size >= _MOST_BYTES or 4 * took > left
        told = torch.tensor([0 if enough else 4 * size], device=local_device())
        dist.broadcast(told, 0, group=group)
        size = int(told)
    return best
