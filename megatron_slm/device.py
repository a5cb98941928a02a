"""Device of this process. The only module that calls `torch.cuda`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def on_gpu() -> bool:
    """Return True if this process computes on a GPU; DS_ACCELERATOR=cpu disables it here and in DeepSpeed."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def local_device() -> torch.device:
    """Return the GPU with index LOCAL_RANK if this process computes on a GPU, else the CPU."""
    if on_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def select_device() -> None:
    """Make `local_device` current; call it before any communication, since NCCL uses the current device."""
    if on_gpu():
        torch.cuda.set_device(local_device())


def communication_backend() -> str:
    """Return `nccl` on GPUs, `gloo` on the CPU."""
    return "nccl" if on_gpu() else "gloo"


def synchronize() -> None:
    """Wait for all work queued on the GPU; do nothing on the CPU."""
    if on_gpu():
        torch.cuda.synchronize()


def timing_event() -> Any | None:
    """Return a CUDA event that records its time on the stream; None on the CPU."""
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
    """Return the state of the GPU's random generator (uint8), or None on the CPU."""
    return torch.cuda.get_rng_state() if on_gpu() else None


def set_device_rng_state(state: torch.Tensor) -> None:
    """Restore a state from `device_rng_state`; do nothing on the CPU."""
    if on_gpu():
        torch.cuda.set_rng_state(state)


def device_name() -> str:
    """Return the GPU's name as its driver reports it, or `cpu`."""
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def compute_capability() -> tuple[int, int]:
    """Generation of the GPU, such as (9, 0) for Hopper; (0, 0) on the CPU."""
    return torch.cuda.get_device_capability() if on_gpu() else (0, 0)


def device_memory() -> tuple[int, int] | None:
    """Return the free and total bytes of this process's GPU, or None on the CPU."""
    return torch.cuda.mem_get_info(local_device()) if on_gpu() else None


def cuda_versions() -> dict[str, str]:
    """Return the versions of CUDA and NCCL of this torch build and the GPU's name; empty on the CPU."""
    if not on_gpu():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA": str(torch.version.cuda), "NCCL": nccl, "GPU": torch.cuda.get_device_name(local_device())}
