"""The start of a pipeline's channels takes as long as two pairs of stages, however many there are."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from megatron_slm.parallel import channels
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.channels import Channels, Lane
from megatron_slm.parallel.topology import Topology

Message = tuple[int, int]
"""Sender and receiver."""


def first_messages(topology: Topology, rank: int, monkeypatch: pytest.MonkeyPatch) -> deque[Message]:
    """What a rank sends and receives at start, one after another."""
    found: deque[Message] = deque()

    def send(x: Any, peer: int, group: Any) -> None:
        found.append((rank, peer))

    def receive(x: Any, peer: int, group: Any) -> None:
        found.append((peer, rank))

    monkeypatch.setattr(channels.dist, "send", send)
    monkeypatch.setattr(channels.dist, "recv", receive)
    monkeypatch.setattr(channels, "create_message_group", lambda pairs: None)
    Channels(topology, rank, torch.device("cpu"), list(Lane), Activity())
    return found


def length_of_start(programs: list[deque[Message]]) -> int:
    """Messages that follow on each other, where each takes both of its ranks."""
    times = [0] * len(programs)
    while any(programs):
        ready = {p[0] for p in programs if p and all(programs[rank][0] == p[0] for rank in p[0])}
        assert ready, "ranks wait for each other in a circle"
        for message in ready:
            end = max(times[rank] for rank in message) + 1
            for rank in message:
                programs[rank].popleft()
                times[rank] = end
    return max(times)


@pytest.mark.parametrize("stages", [2, 3, 8, 16])
def test_first_messages_do_not_wait_for_each_other(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(pipeline=stages, tensor=2)
    programs = [first_messages(topology, rank, monkeypatch) for rank in range(2 * stages)]
    assert sum(map(len, programs)) == 2 * len(Lane) * 2 * (stages - 1)
    assert length_of_start(programs) == len(Lane) * min(stages - 1, 2)
