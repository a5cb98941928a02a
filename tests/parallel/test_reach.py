"""Nodes that give no sign of life are told from those whose ranks have merely ended."""

from __future__ import annotations

import errno
import socket

import pytest

from megatron_slm.parallel.reach import Listener, Place, nccl_address, own_address, silent_nodes

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
        places = [
            Place(host="own", address=NOWHERE, port=1),
            Place(host="alive", address="127.0.0.1", port=listener.port),
            Place(host="ended", address="127.0.0.1", port=closed.port),
            Place(host="gone", address=NOWHERE, port=listener.port),
            Place(host="gone", address=NOWHERE, port=listener.port),
            Place(host="never known", address=None, port=1),
        ]
        assert silent_nodes(places, "own") == ["gone (ranks 3, 4)"]
        assert silent_nodes(places[:1], "own") == []


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
