"""The first meeting of the ranks: over torch's key-value store alone, before a process group exists.

A process group that cannot be made hangs until its time-out and then says little. Here a rank that does not come is
named, and so is every pair of nodes of which one cannot open a connection to the other.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_slm.config.run import RunConfig
from megatron_slm.errors import PeerError, PreflightError, SlmError
from megatron_slm.operations.preflight.facts import Facts, existing, is_first_of_node, name_nodes
from megatron_slm.operations.reach import Listener

_CONNECT_SECONDS = 5.0
_SHARED_FOLDER_SECONDS = 5.0
"""A network file system may show another node's file this much later."""
_LOOPBACK = ("127.", "::1")
_RANK_0_LATER = timedelta(seconds=10)
"""Rank 0 may begin to wait this much later than the others."""
_ROSTER = ("node", "address", "port", "token")
"""The facts that every rank is told; all of them stay with rank 0, for there may be thousands of ranks."""
_T = TypeVar("_T")


class Meeting:
    """This rank's place in the store that `deepspeed` or `torchrun` named, which its process group will use too.

    Raises:
        PeerError: (as all methods) rank 0's node cannot be reached, or ranks did not come in time.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.timeout = timeout
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._topics = f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
        try:
            self._store = TCPStore(
                host, port, self.world_size, serves, timeout, wait_for_workers=False, multi_tenant=True
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(
                "MASTER_ADDR:MASTER_PORT",
                f"{host}:{port}",
                f"is where rank 0 listens and rank {self.rank} ({socket.gethostname()}) can connect to "
                f"({str(error).splitlines()[0]})",
                "name an address of rank 0's node that all nodes reach, and a port that is free there and not "
                "filtered (--master_addr, --master_port)",
            ) from error

    def settle(
        self, topic: str, value: Any, decide: Callable[[list[Any]], _T], *, ranks: Sequence[int] | None = None
    ) -> _T:
        """Rank 0 collects values, decides, and tells every rank what.

        Args:
            topic: used once in a meeting.
            value: this rank's, of what JSON can say.
            decide: from the values of `ranks`, in order, to something that JSON can say; called on rank 0 only.
            ranks: whose values are collected; default: all.

        Raises:
            PreflightError: elsewhere than on rank 0, what `decide` raised there.
        """
        ranks = range(self.world_size) if ranks is None else ranks
        keys, outcome_key = [f"{self._topics}/{topic}/{rank}" for rank in ranks], f"{self._topics}/{topic}/outcome"
        if self.rank in ranks:
            self._store.set(f"{self._topics}/{topic}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return self._decide(keys, outcome_key, decide, ranks)
        try:
            self._store.wait([outcome_key], self.timeout + _RANK_0_LATER)
            outcome = json.loads(self._store.get(outcome_key))
        except RuntimeError as error:
            raise _missing("0", self.timeout) from error
        if "decided" in outcome:
            return outcome["decided"]
        self.leave()
        if "missing" in outcome:
            raise _missing(outcome["missing"], self.timeout)
        raise PreflightError("rank 0", outcome["failed"], "can judge", "see its own output")

    def _decide(self, keys: list[str], outcome_key: str, decide: Callable[[list[Any]], _T], ranks: Sequence[int]) -> _T:
        try:
            self._store.wait(keys, self.timeout)
        except RuntimeError as error:
            missing = ", ".join(
                str(rank) for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])
            )
            self._store.set(outcome_key, json.dumps({"missing": missing}))
            self.leave()
            raise _missing(missing, self.timeout) from error
        try:
            decided = decide([json.loads(value) for value in self._store.multi_get(keys)] if keys else [])
        except SlmError as error:
            self._store.set(outcome_key, json.dumps({"failed": str(error)}))
            self.leave()
            raise
        self._store.set(outcome_key, json.dumps({"decided": decided}))
        return decided

    def leave(self) -> None:
        """Nothing more will be asked; rank 0, which holds the store, waits a little for all others to say so."""
        self._store.set(f"{self._topics}/left/{self.rank}", "")
        if self.rank == 0:
            with suppress(RuntimeError):  # some never came
                self._store.wait([f"{self._topics}/left/{rank}" for rank in range(self.world_size)], _RANK_0_LATER)


def _missing(ranks: str, timeout: timedelta) -> PeerError:
    return PeerError(
        "ranks that did not report",
        ranks,
        f"is empty after {timeout.total_seconds():.0f} s",
        "look at the output of their nodes: did the launcher start them, did they fail?",
    )


def meet(meeting: Meeting, mine: Facts, config: RunConfig) -> tuple[list[Facts], list[list[int]], bool]:
    """Tell each other the facts, and try whether every node reaches every other and sees the checkpoint folder.

    Returns:
        all ranks' facts, on rank 0 (elsewhere nothing); the ranks of each node; whether all nodes reach each other.
    """
    known: list[Facts] = []

    def introduce(facts: list[Facts]) -> list[Facts]:
        known.extend(name_nodes(facts))
        return [{name: rank.get(name) for name in _ROSTER} for rank in known]

    def compare(found: list[Facts]) -> bool:
        for rank, of_node in zip(speakers, found, strict=True):
            known[rank] |= of_node
        return not any(of_node["unreachable"] for of_node in found)

    with Listener() if is_first_of_node() else nullcontext() as listener, _TokenFile(meeting, config) as token:
        mine = {**mine, "port": listener.port if listener else None, "token": token}
        roster = meeting.settle("facts", mine, introduce)
        speakers = [rank for rank, facts in enumerate(roster) if facts["port"] is not None]
        found = None
        if meeting.rank in speakers:
            found = {
                "unreachable": unreachable(roster[meeting.rank], [roster[rank] for rank in speakers]),
                "sees_save": _sees(roster[0]["token"]),
            }
        # nobody stops listening, or takes the file away, while another still looks
        reachable = meeting.settle("found", found, compare, ranks=speakers)
    nodes: dict[str, list[int]] = {}
    for rank, facts in enumerate(roster):
        nodes.setdefault(facts["node"], []).append(rank)
    return known, list(nodes.values()), reachable


def unreachable(mine: Facts, facts: Sequence[Facts]) -> dict[str, str]:
    """The nodes that this one cannot open a connection to, and why."""
    others = [other for other in facts if other["node"] != mine["node"]]
    if not others:
        return {}
    with ThreadPoolExecutor(16) as pool:
        reasons = list(pool.map(_why_unreachable, others))
    return {other["node"]: reason for other, reason in zip(others, reasons, strict=True) if reason}


def _why_unreachable(other: Facts) -> str | None:
    address, port = other["address"], other["port"]
    if address is None:
        return "its host name, or the interface named, has no address there"
    if address.startswith(_LOOPBACK):
        return f"its own address there is {address}, which only it can reach"
    try:
        with closing(socket.create_connection((address, port), _CONNECT_SECONDS)):
            return None
    except OSError as error:
        return f"{address} port {port}: {error.strerror or error}"


class _TokenFile:
    """A file that rank 0 makes where checkpoints go, for the others to see; its path, or None."""

    def __init__(self, meeting: Meeting, config: RunConfig) -> None:
        self.path: Path | None = None
        if meeting.rank == 0 and config.checkpoint.enabled:
            self.path = existing(Path(config.save_folder)) / f".preflight-{uuid.uuid4().hex}"

    def __enter__(self) -> str | None:
        if self.path is None:
            return None
        try:
            self.path.touch()
        except OSError:  # that it cannot be written is a fact of its own
            self.path = None
        return str(self.path) if self.path else None

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


def _sees(token: str | None) -> bool | None:
    if token is None:
        return None
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    while not Path(token).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
