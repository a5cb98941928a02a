"""The ranks' rendezvous over torch's key-value store alone, before a process group exists.

A process group that cannot form hangs until its timeout and then reports little. Here every missing rank is named, and
every pair of nodes that cannot connect.
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
from megatron_slm.operations.reach import Listener
from megatron_slm.preflight.facts import Facts, existing, is_first_of_node, name_nodes

_CONNECT_SECONDS = 5.0
_SHARED_FOLDER_SECONDS = 5.0
"""Delay with which a network file system may show another node's file."""
_LOOPBACK = ("127.", "::1")
_RANK_0_DELAY = timedelta(seconds=10)
"""Delay with which rank 0 may start to wait after the others."""
_ROSTER = ("node", "address", "port", "token")
"""Facts sent to every rank; the rest stay on rank 0, because there may be thousands of ranks."""
_T = TypeVar("_T")


class Rendezvous:
    """This rank's client of the store that `deepspeed` or `torchrun` set up, later used by the process group.

    Raises:
        PeerError: (as all methods) rank 0's node is unreachable, or ranks did not report in time.
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
                f"be an address of rank 0 that rank {self.rank} ({socket.gethostname()}) can connect to "
                f"({str(error).splitlines()[0]})",
                "set --master_addr to an address of rank 0's node that all nodes can reach, and --master_port to a "
                "free port that no firewall blocks",
            ) from error

    def decide_on_rank_0(
        self, topic: str, value: Any, decide: Callable[[list[Any]], _T], *, ranks: Sequence[int] | None = None
    ) -> _T:
        """Collect values on rank 0, apply `decide` to them there, and return its result on every rank.

        Args:
            topic: name of the exchange, used once.
            value: this rank's JSON-compatible value.
            decide: maps the values of `ranks`, in order, to a JSON-compatible result; called on rank 0 only.
            ranks: ranks whose values are collected; default: all.

        Raises:
            PreflightError: on all ranks but 0, if `decide` raised an error on rank 0.
        """
        ranks = range(self.world_size) if ranks is None else ranks
        keys, outcome_key = [f"{self._topics}/{topic}/{rank}" for rank in ranks], f"{self._topics}/{topic}/outcome"
        if self.rank in ranks:
            self._store.set(f"{self._topics}/{topic}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return self._decide(keys, outcome_key, decide, ranks)
        try:
            self._store.wait([outcome_key], self.timeout + _RANK_0_DELAY)
            outcome = json.loads(self._store.get(outcome_key))
        except RuntimeError as error:
            raise _missing([0], self.timeout) from error
        if "decided" in outcome:
            return outcome["decided"]
        self.leave()
        if "missing" in outcome:
            raise _missing(outcome["missing"], self.timeout)
        raise PreflightError("rank 0's preflight", outcome["error"], "finish without an error", "see rank 0's output")

    def _decide(self, keys: list[str], outcome_key: str, decide: Callable[[list[Any]], _T], ranks: Sequence[int]) -> _T:
        try:
            self._store.wait(keys, self.timeout)
        except RuntimeError as error:
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]
            self._store.set(outcome_key, json.dumps({"missing": missing}))
            self.leave()
            raise _missing(missing, self.timeout) from error
        try:
            decided = decide([json.loads(value) for value in self._store.multi_get(keys)] if keys else [])
        except SlmError as error:
            self._store.set(outcome_key, json.dumps({"error": str(error)}))
            self.leave()
            raise
        self._store.set(outcome_key, json.dumps({"decided": decided}))
        return decided

    def leave(self) -> None:
        """Disconnect; rank 0, which hosts the store, first waits a little for the other ranks to leave."""
        self._store.set(f"{self._topics}/left/{self.rank}", "")
        if self.rank == 0:
            with suppress(RuntimeError):  # some ranks never reported
                self._store.wait([f"{self._topics}/left/{rank}" for rank in range(self.world_size)], _RANK_0_DELAY)


def _missing(ranks: Sequence[int], timeout: timedelta) -> PeerError:
    listed = f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    return PeerError(
        f"preflight report of {listed}",
        None,
        f"arrive within {timeout.total_seconds():.0f} s (--distributed-timeout-minutes)",
        "see the output of those nodes: the launcher may not have started the ranks, or they failed",
    )


def exchange_facts(rendezvous: Rendezvous, mine: Facts, config: RunConfig) -> tuple[list[Facts], list[list[int]], bool]:
    """Collect all facts on rank 0, and test that every node can connect to every other and sees the checkpoint folder.

    Returns:
        facts of all ranks, by rank (empty on all ranks but 0); ranks of each node; True if all nodes can connect.
    """
    known: list[Facts] = []

    def assign_nodes(facts: list[Facts]) -> list[Facts]:
        known.extend(name_nodes(facts))
        return [{name: rank.get(name) for name in _ROSTER} for rank in known]

    def merge(found: list[Facts]) -> bool:
        for rank, of_node in zip(leaders, found, strict=True):
            known[rank] |= of_node
        return not any(of_node["unreachable"] for of_node in found)

    with Listener() if is_first_of_node() else nullcontext() as listener, _TokenFile(rendezvous, config) as token:
        mine = {**mine, "port": listener.port if listener else None, "token": token}
        roster = rendezvous.decide_on_rank_0("facts", mine, assign_nodes)
        leaders = [rank for rank, facts in enumerate(roster) if facts["port"] is not None]
        found = None
        if rendezvous.rank in leaders:
            found = {
                "unreachable": unreachable(roster[rendezvous.rank], [roster[rank] for rank in leaders]),
                "sees_save": _sees(roster[0]["token"]),
            }
        # the listeners and the file stay until every node has tested them
        reachable = rendezvous.decide_on_rank_0("found", found, merge, ranks=leaders)
    nodes: dict[str, list[int]] = {}
    for rank, facts in enumerate(roster):
        nodes.setdefault(facts["node"], []).append(rank)
    return known, list(nodes.values()), reachable


def unreachable(mine: Facts, facts: Sequence[Facts]) -> dict[str, str]:
    """Return the nodes that this one cannot connect to, with the reason."""
    others = [other for other in facts if other["node"] != mine["node"]]
    if not others:
        return {}
    with ThreadPoolExecutor(16) as pool:
        reasons = list(pool.map(_connection_error, others))
    return {other["node"]: reason for other, reason in zip(others, reasons, strict=True) if reason}


def _connection_error(other: Facts) -> str | None:
    address, port = other["address"], other["port"]
    if address is None:
        return "its host name or interface has no address"
    if address.startswith(_LOOPBACK):
        return f"its address is {address}, which only it can reach"
    try:
        with closing(socket.create_connection((address, port), _CONNECT_SECONDS)):
            return None
    except OSError as error:
        return f"{address} port {port}: {error.strerror or error}"


class _TokenFile:
    """A temporary file of rank 0 in the checkpoint folder, to test that other nodes see it; yields its path or None."""

    def __init__(self, rendezvous: Rendezvous, config: RunConfig) -> None:
        self.path: Path | None = None
        if rendezvous.rank == 0 and config.checkpoint.enabled:
            self.path = existing(Path(config.save_folder)) / f".preflight-{uuid.uuid4().hex}"

    def __enter__(self) -> str | None:
        if self.path is None:
            return None
        try:
            self.path.touch()
        except OSError:  # reported by `not_writable`
            self.path = None
        return str(self.path) if self.path else None

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


def _sees(token: str | None) -> bool | None:
    """Return True if the file appears in time; None without a file."""
    if token is None:
        return None
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    while not Path(token).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
