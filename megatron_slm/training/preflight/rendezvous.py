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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_slm.config import RunConfig
from megatron_slm.errors import PeerError
from megatron_slm.parallel.reach import Listener
from megatron_slm.training.preflight.facts import Facts, existing, is_first_of_node, name_nodes

_CONNECT_SECONDS = 5.0
_SHARED_FOLDER_SECONDS = 5.0
"""A network file system may show another node's file this much later."""
_LOOPBACK = ("127.", "::1")


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
            self.store = TCPStore(
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

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        self.store.set(f"{self._topics}/{topic}/{self.rank}", json.dumps(value))
        keys = [f"{self._topics}/{topic}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.wait(keys, self.timeout)
        except RuntimeError as error:
            raise self._missing(keys, error) from error
        return [json.loads(self.store.get(key)) for key in keys]

    def _missing(self, keys: Sequence[str], cause: Exception) -> PeerError:
        missing = []
        with suppress(RuntimeError):  # rank 0 is gone, and the store with it
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return PeerError(
            "ranks that did not report",
            ", ".join(map(str, missing)) or f"rank 0 is gone ({str(cause).splitlines()[0]})",
            f"is empty after {self.timeout.total_seconds():.0f} s",
            "look at the output of their nodes: did the launcher start them, did they fail?",
        )


def exchange_facts(meeting: Meeting, mine: Facts, config: RunConfig) -> list[Facts]:
    """All ranks' facts, with what they found of each other: nodes they cannot connect to, and a folder not shared."""
    speaks = is_first_of_node()
    with Listener() if speaks else nullcontext() as listener, _TokenFile(meeting, config) as token:
        mine = {**mine, "port": listener.port if listener else None, "token": token}
        facts = name_nodes(meeting.exchange("facts", mine))
        found: Facts = {}
        if speaks:
            found = {"unreachable": unreachable(facts[meeting.rank], facts), "sees_save": _sees(facts[0]["token"])}
        # nobody stops listening, or takes the file away, while another still looks
        return [{**one, **other} for one, other in zip(facts, meeting.exchange("found", found), strict=True)]


def unreachable(mine: Facts, facts: Sequence[Facts]) -> dict[str, str]:
    """The nodes that this one cannot open a connection to, and why."""
    others = [other for other in facts if other["port"] is not None and other["node"] != mine["node"]]
    if not others:
        return {}
    with ThreadPoolExecutor(16) as pool:
        reasons = list(pool.map(_why_unreachable, others))
    return {other["node"]: reason for other, reason in zip(others, reasons, strict=True) if reason}


def _why_unreachable(other: Facts) -> str | None:
    address, port = other["address"], other["port"]
    if address is None:
        return "its host name has no address there"
    if address.startswith(_LOOPBACK):
        return f"its host name stands for {address} there, which only it can reach"
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
