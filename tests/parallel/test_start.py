"""Starting a world: a port that is taken, and warnings that mean nothing here."""

from __future__ import annotations

import contextlib
import io
import os
import socket

import torch
import torch.distributed as dist

from megatron_slm.errors import PeerError
from megatron_slm.log import setup_logging
from megatron_slm.parallel.groups import init_distributed
from tests.support.world import run_world


def start_on(port: int) -> str:
    os.environ["MASTER_PORT"] = str(port)
    try:
        init_distributed()
    except PeerError as error:
        return str(error)
    return ""


def test_a_port_in_use_is_named() -> None:
    """As by the second of two launches on one node without --master_port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (error,) = run_world(start_on, 1, port)
    assert error.startswith(f"--master_port is '{port}': must be a free port of rank 0's node. Fix: end the run")


def broadcast_beside_autograd() -> str:
    """What is printed when a tensor of an autograd graph is broadcast, as DeepSpeed does with tied embeddings."""
    setup_logging()
    init_distributed()
    x = torch.ones(3, requires_grad=True) * 1
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        dist.broadcast(x, src=0)
        x.sum().backward()
    return printed.getvalue()


def test_broadcasts_beside_autograd_print_nothing() -> None:
    assert run_world(broadcast_beside_autograd, 1) == [""]
