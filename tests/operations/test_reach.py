"""Nodes that do not respond, apart from those whose ranks have merely ended."""

from __future__ import annotations

import errno
import socket

import pytest
import torch.distributed as dist

from megatron_slm.errors import PeerError
from megatron_slm.operations import reach
from megatron_slm.operations.reach import Host, Listener, name_silent_nodes, nccl_address, own_address, silent_nodes

NOWHERE = "192.0.2.1"


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(errno.EHOSTUNREACH, "No route to host")])
def test_only_hosts_that_do_not_answer_are_silent(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_connection

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == NOWHERE:  # some networks answer for any address
            raise error
        return real(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connect)
    with Listener() as closed:
        pass
    with pytest.raises(ConnectionRefusedError):
        real(("127.0.0.1", closed.port), 5.0)
    with Listener() as listener:
        hosts = [
            Host(name="own", address=NOWHERE, port=1),
            Host(name="alive", address="127.0.0.1", port=listener.port),
            Host(name="ended", address="127.0.0.1", port=closed.port),
            Host(name="gone", address=NOWHERE, port=listener.port),
            Host(name="gone", address=NOWHERE, port=listener.port),
            Host(name="never known", address=None, port=1),
        ]
        assert silent_nodes(hosts, "own") == ["gone (ranks 3, 4)"]
        assert silent_nodes(hosts[:1], "own") == []


def test_the_address_that_other_nodes_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert own_address() is None
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert own_address() is None


@pytest.mark.parametrize(
    ("rule", "address"),
    [
        ("", "10.1.0.1"), ("eth", "10.0.0.1"), ("=eth1", "10.0.1.1"), ("^ib,eth0,lo,docker", "10.0.1.1"), ("=et", None),
        ("wlan,eth1", "10.0.1.1"),
    ],
)  # fmt: skip
def test_the_interface_that_nccl_takes(rule: str, address: str | None) -> None:
    interfaces = {
        "lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"], "ib0": ["10.1.0.1"],
    }  # fmt: skip
    assert nccl_address(rule, interfaces) == address


def test_a_rank_that_is_lost_at_the_start_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(value: object) -> list[object]:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234")

    monkeypatch.setattr(reach, "all_gather_objects", lost)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(PeerError, match="rank 0: exchanging addresses"), name_silent_nodes():
        pass
