"""One rank of a large world in one process, on torch's fake process groups: its code is real, its peers are not.

Collectives leave a rank's tensors as they are, objects of other ranks are this rank's own, received tensors are zero.
So what a rank builds, opens and calls is what it would among a thousand others; losses mean nothing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter",
)  # fmt: skip
GROUPS = ("new_group", "split_group")
GPUS_PER_NODE = 8


class SimulatedRank:
    """Rank `rank` of a world of `size`: replaces torch.distributed's functions in this process and counts their calls.

    Args:
        heard: objects that rank 0 broadcasts, in their order (`said` of a simulated rank 0); without them the other
            ranks hear what they would say themselves.
    """

    def __init__(self, rank: int, size: int, heard: list[Any] | None = None) -> None:
        self.rank, self.size = rank, size
        self.calls: collections.Counter[str] = collections.Counter()
        self.nocolor_splits = 0
        self.said: list[Any] = []
        self._heard = list(heard or [])
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank % GPUS_PER_NODE),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu",
        )  # fmt: skip
        self._replace_functions()

    @property
    def new_groups(self) -> int:
        """Calls that create process groups, this rank's own and other ranks'."""
        return sum(self.calls[name] for name in GROUPS)

    @property
    def collectives(self) -> int:
        """Calls of collectives; messages between two ranks are not counted."""
        return sum(self.calls[name] for name in COLLECTIVES)

    def _replace_functions(self) -> None:
        from deepspeed.comm.torch import TorchBackend

        stand_ins: dict[str, Callable[..., Any]] = {
            "init_process_group": self._init_process_group,
            "all_gather_object": self._all_gather_object,
            "broadcast_object_list": self._broadcast_object_list,
            "recv": _receive,
            "irecv": _receive,
        }
        for name in ("init_process_group", *COLLECTIVES, *GROUPS, "send", "isend", "recv", "irecv"):
            counted = self._counted(name, stand_ins.get(name, getattr(dist, name)))
            for module in (dist, dist.distributed_c10d):
                if hasattr(module, name):
                    setattr(module, name, counted)
        TorchBackend.init_process_group = _as_on_gpus

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted

    def _init_process_group(self, *_: Any, device_id: torch.device | None = None, **__: Any) -> None:
        """Start the fake backend; with a device, groups are split off the world's communicator as NCCL does."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        _REAL_INIT("fake", rank=self.rank, world_size=self.size, store=FakeStore())
        if device_id is not None:
            dist.distributed_c10d._get_split_source = lambda group: self
            dist.distributed_c10d._get_default_group().bound_device_id = device_id

    supports_splitting = True

    def perform_nocolor_split(self, device: torch.device) -> None:
        """Count a split of the world that makes a group of other ranks."""
        self.nocolor_splits += 1

    def _all_gather_object(self, objects: list[Any], value: Any, *_: Any, **__: Any) -> None:
        objects[:] = [value] * len(objects)

    def _broadcast_object_list(self, objects: list[Any], src: int = 0, *_: Any, **__: Any) -> None:
        if self.rank == src:
            self.said.append(list(objects))
        elif self._heard:
            objects[:] = self._heard.pop(0)


_REAL_INIT = dist.init_process_group


class _Done:
    def wait(self, *_: Any, **__: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _receive(tensor: torch.Tensor, *_: Any, **__: Any) -> _Done:
    tensor.zero_()
    return _Done()


def _as_on_gpus(backend: Any, name: str, timeout: Any, init_method: Any, rank: int, world_size: int) -> None:
    """DeepSpeed's `TorchBackend.init_process_group` on CUDA: binds the device where no one was there before it."""
    if not dist.is_initialized():
        dist.init_process_group(name, timeout=timeout, device_id=torch.device("cuda", 0))
    backend.using_mpi = False


class FileOpens:
    """Counts the files that are opened under a folder, by Python or by the safetensors library."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self._on = str(folder), 0, True
        sys.addaudithook(self._audit)
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron_slm.") and hasattr(module, "safe_open"):
                module.safe_open = self._counted(module.safe_open)  # type: ignore[attr-defined]
            if name.startswith("megatron_slm.") and hasattr(module, "load_file"):
                module.load_file = self._counted(module.load_file)  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Stop counting; a hook cannot be removed."""
        self._on = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and event == "open":
            self._note(arguments[0])

    def _note(self, path: Any) -> None:
        if isinstance(path, str | Path) and str(path).startswith(self.folder):
            self.count += 1

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._on:
                self._note(path)
            return function(path, *args, **kwargs)

        return counted


def import_what_engines_need() -> None:
    """Import what DeepSpeed imports while it makes an engine, so that its memory does not count as the engine's."""
    for name in (
        "torch._dynamo",
        "deepspeed.comm.mori",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ):
        importlib.import_module(name)


@contextlib.contextmanager
def peak_host_bytes(interval_seconds: float = 0.005) -> Iterator[Callable[[], int]]:
    """Measure by how much this process' anonymous memory grows at its most, inside the context."""
    before, most, ended = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(interval_seconds):
            most[0] = max(most[0], _anonymous_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        ended.set()
        thread.join()


def _anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
