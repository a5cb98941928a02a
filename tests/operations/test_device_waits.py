"""A rank whose host waits for its GPU, which waits for a peer, counts as waiting."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest

from megatron_slm.operations import device_waits
from megatron_slm.operations.device_waits import oldest_active, waits_on_device


def trace(*states: str, **more: Any) -> str:
    entries = [
        {
            "record_id": number, "state": state, "profiling_name": f"nccl:all_reduce {number}", "retired": False,
            "process_group": ["1", "data parallel"], **more,
        }
        for number, state in enumerate(states)
    ]  # fmt: skip
    return json.dumps({"version": "2.10", "entries": entries[::-1]})


def test_the_oldest_that_has_not_ended_is_named() -> None:
    found = oldest_active(trace("completed", "started", "scheduled", "scheduled"))
    assert found == "nccl:all_reduce 1 of group data parallel, issued 2 communications before the last"
    assert oldest_active(trace("completed")) is None
    assert oldest_active(trace("scheduled", retired=True)) is None
    assert oldest_active("{}") is None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._distributed_c10d as c10d

    monkeypatch.setattr(device_waits, "on_gpu", lambda: True)
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda *_: trace("completed", "scheduled"))


def test_a_host_that_reads_a_value_waits(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: dict[int, Any] = {}
    monkeypatch.setattr(device_waits.sys, "_current_frames", lambda: frames)

    def at(line: str) -> None:
        code = types.SimpleNamespace(co_filename="a file")
        frames[1] = types.SimpleNamespace(f_code=code, f_lineno=1)
        monkeypatch.setattr(device_waits.linecache, "getline", lambda *_: line)

    at("    total = total.cpu()  # a step's one transfer from the device")
    assert (
        waits_on_device()
        == "its GPU is in nccl:all_reduce 1 of group data parallel, issued 0 communications before the last"
    )
    at("    tokens = self.read_next_document()")
    assert waits_on_device() is None


def test_without_a_gpu_nothing_waits_for_one() -> None:
    assert waits_on_device() is None
