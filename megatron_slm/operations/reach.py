"""Which nodes still answer, asked when a wait for other ranks has failed.

Gloo and NCCL say of a collective that it timed out, and not for whom: a node that lost its power or its network is then
named by nobody. Here each rank can ask every other node for a sign of life, over a connection of its own.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import psutil

from megatron_slm.device import communication_backend
from megatron_slm.errors import PeerError
from megatron_slm.parallel.collectives import all_gather_objects, translate_peer_errors

_ANSWER_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank runs, and the port that it listens at."""

    host: str
    address: str | None
    port: int


def own_address() -> str | None:
    """The IPv4 address that the backend offers to other nodes, as far as it can be told from outside.

    Gloo's is that of GLOO_SOCKET_IFNAME, else what the host name stands for. NCCL does not look at the host name.
    """
    if communication_backend() == "nccl":
        found = {
            name: [a.address for a in addresses if a.family == socket.AF_INET]
            for name, addresses in psutil.net_if_addrs().items()
        }
        return nccl_address(os.environ.get("NCCL_SOCKET_IFNAME", ""), found)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        addresses = psutil.net_if_addrs().get(interface.split(",")[0], [])
        return next((a.address for a in addresses if a.family == socket.AF_INET), None)
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def nccl_address(rule: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The first address of the interfaces that NCCL_SOCKET_IFNAME allows.

    Args:
        rule: beginnings of names, or with `=` whole names, or with `^` those to leave out; empty: InfiniBand's first,
            then any but loopback and docker's.
        interfaces: addresses by name.
    """
    words = [word for word in rule.lstrip("^=").split(",") if word]

    def allowed(name: str) -> bool:
        if not rule:
            return not name.startswith(("lo", "docker"))
        named = name in words if rule.startswith("=") else name.startswith(tuple(words))
        return named != rule.startswith("^")

    names = sorted(filter(allowed, interfaces), key=lambda name: not name.startswith("ib") if not rule else 0)
    return next((address for name in names for address in interfaces[name]), None)


class Listener:
    """A port that anyone may connect to, for as long as it is entered."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port = int(self._socket.getsockname()[1])

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._socket.accept()[0].close()

    def __enter__(self) -> Listener:
        self._thread = threading.Thread(target=self._accept, name="reach", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on Linux this wakes the thread, which would keep the port open
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(_ANSWER_SECONDS)


@contextmanager
def silent_nodes_named() -> Iterator[None]:
    """To a `PeerError` that is raised inside, the nodes that give no sign of life are added. Collective at its start.

    Raises:
        PeerError: as inside; or a rank is lost at the start.
    """
    with Listener() as listener:
        own = Place(host=socket.gethostname(), address=own_address(), port=listener.port)
        with translate_peer_errors("telling the others how to reach this node"):
            places = all_gather_objects(own)
        try:
            yield
        except PeerError as error:
            silent = silent_nodes(places, socket.gethostname())
            if not silent:
                raise
            value = f"{error.value}; no sign of life from {', '.join(silent)}"
            raise PeerError(error.field, value, error.rule, error.fix) from error


def silent_nodes(places: Sequence[Place], own_host: str) -> list[str]:
    """The other hosts that do not answer, with their ranks.

    A host on which the port is closed answers too: that a rank is gone there can be a consequence, and not the cause.
    """
    ranks: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place.host, []).append(rank)
    hosts = [host for host in ranks if host != own_host]
    if not hosts:
        return []
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda host: _answers(places[ranks[host][0]]), hosts))
    return [
        f"{host} (rank{'s' * (len(ranks[host]) > 1)} {', '.join(map(str, ranks[host]))})"
        for host, answered in zip(hosts, answers, strict=True)
        if not answered
    ]


def _answers(place: Place) -> bool:
    if place.address is None:
        return True  # it was never known where it is
    try:
        with closing(socket.create_connection((place.address, place.port), _ANSWER_SECONDS)):
            return True
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
