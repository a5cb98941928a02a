"""Finds the nodes that do not respond, after a wait for other ranks has failed.

Gloo and NCCL report that a collective timed out, but not for which rank, so no error names a node that lost its power
or its network. Here each rank contacts every other node over a connection of its own.
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

_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host of one rank, with the address and port of the rank's `Listener`."""

    name: str
    address: str | None
    """IPv4 address for other nodes; None if unknown."""
    port: int


def own_address() -> str | None:
    """Return the IPv4 address that the backend most likely advertises to other nodes, or None if it is unknown.

    Gloo takes the interface in GLOO_SOCKET_IFNAME, or else resolves the host name; NCCL ignores the host name.
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
    """Return the first address of the interfaces that NCCL_SOCKET_IFNAME allows.

    Args:
        rule: comma-separated prefixes of names; with a leading `=` whole names, with `^` names to exclude. Empty:
            InfiniBand first, then any interface but loopback and docker.
        interfaces: addresses by interface name.
    """
    words = [word for word in rule.lstrip("^=").split(",") if word]

    def allowed(name: str) -> bool:
        if not rule:
            return not name.startswith(("lo", "docker"))
        if rule.startswith("^"):
            return not name.startswith(tuple(words))
        return name in words if rule.startswith("=") else name.startswith(tuple(words))

    names = [name for name in interfaces if allowed(name)]
    if not rule:
        names.sort(key=lambda name: not name.startswith("ib"))
    return next((address for name in names for address in interfaces[name]), None)


class Listener:
    """Context manager that accepts TCP connections on a free port."""

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
        self._thread.join(_CONNECT_SECONDS)


@contextmanager
def name_silent_nodes() -> Iterator[None]:
    """Add the nodes that do not respond to any `PeerError` raised inside. Collective on entry.

    Raises:
        PeerError: the one raised inside; or a rank was lost on entry.
    """
    with Listener() as listener:
        own = Host(name=socket.gethostname(), address=own_address(), port=listener.port)
        with translate_peer_errors("exchanging addresses"):
            hosts = all_gather_objects(own)
        try:
            yield
        except PeerError as error:
            silent = silent_nodes(hosts, socket.gethostname())
            if not silent:
                raise
            value = f"{error.value}; no response from {', '.join(silent)}"
            raise PeerError(error.field, value, error.rule, error.fix) from error


def silent_nodes(hosts: Sequence[Host], own_name: str) -> list[str]:
    """Return the other hosts that do not respond, with their ranks.

    A host that refuses the connection has responded: its rank may have ended as a consequence, not as the cause.

    Args:
        hosts: by rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host.name, []).append(rank)
    others = [name for name in ranks if name != own_name]
    if not others:
        return []
    with ThreadPoolExecutor(64) as pool:
        responses = list(pool.map(lambda name: _responds(hosts[ranks[name][0]]), others))
    silent = [name for name, responded in zip(others, responses, strict=True) if not responded]
    return [f"{name} ({_listed(ranks[name])})" for name in silent]


def _listed(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _responds(host: Host) -> bool:
    if host.address is None:
        return True  # unknown: it cannot be contacted
    try:
        with closing(socket.create_connection((host.address, host.port), _CONNECT_SECONDS)):
            return True
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
