"""The one place that knows which device this process computes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def on_gpu() -> bool:
    """Whether this process computes on a GPU; DS_ACCELERATOR=cpu, DeepSpeed's switch, says no for both."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def local_device() -> torch.device:
    """This process's device: the GPU numbered LOCAL_RANK where there is one, else the CPU."""
    if on_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def select_device() -> None:
    """Make this process's device the current one, before anything communicates: NCCL takes the current device."""
    if on_gpu():
        torch.cuda.set_device(local_device())


def communication_backend() -> str:
    """`nccl` on GPUs, `gloo` on the CPU."""
    return "nccl" if on_gpu() else "gloo"


def synchronize() -> None:
    """Wait until the device has done all it was told; without effect where there is no GPU."""
    if on_gpu():
        torch.cuda.synchronize()


def timing_event() -> Any | None:
    """An event that takes the time at which the GPU's stream reaches it; None on the CPU, which needs none."""
    return torch.cuda.Event(enable_timing=True) if on_gpu() else None


class SideStream:
    """A stream beside the computing one, for work that need not wait for all that was computed; no-op on the CPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if on_gpu() else None
        self._mark: Any | None = None

    def mark(self) -> None:
        """Remember how far the computing stream has come: what is issued here next waits for that much of it."""
        if self._stream is not None:
            self._mark = torch.cuda.current_stream().record_event()

    @contextmanager
    def after_mark(self) -> Iterator[None]:
        """Inside, memory is allocated and work is issued on this stream, after what `mark` remembered."""
        if self._stream is None:
            yield
            return
        if self._mark is not None:
            self._stream.wait_event(self._mark)
        with torch.cuda.stream(self._stream):
            yield

    def hand_over(self, x: torch.Tensor) -> None:
        """Let the computing stream use a tensor of this stream's memory, which is then free only after that."""
        if self._stream is not None:
            x.record_stream(torch.cuda.current_stream())


def device_rng_state() -> torch.Tensor | None:
    """State of the device's random generator (uint8), or None where the device is the CPU."""
    return torch.cuda.get_rng_state() if on_gpu() else None


def set_device_rng_state(state: torch.Tensor) -> None:
    """Put back a state from `device_rng_state`; without effect where there is no GPU."""
    if on_gpu():
        torch.cuda.set_rng_state(state)


def device_name() -> str:
    """The GPU's name as its driver says it, or `cpu`."""
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def compute_capability() -> tuple[int, int]:
    """Generation of the GPU, such as (9, 0) for Hopper; (0, 0) on the CPU."""
    return torch.cuda.get_device_capability() if on_gpu() else (0, 0)


def device_memory() -> tuple[int, int] | None:
    """Free and total bytes of this process's device, or None where it is the CPU."""
    return torch.cuda.mem_get_info(local_device()) if on_gpu() else None


def cuda_versions() -> dict[str, str]:
    """Versions of CUDA and NCCL that torch was built with, and the device's name; empty on the CPU."""
    if not on_gpu():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA": str(torch.version.cuda), "NCCL": nccl, "GPU": torch.cuda.get_device_name(local_device())}
