"""Bytes that autograd saves for a backward pass, and ranks of larger worlds that communicate with nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel.groups import TensorParallel


def saved_bytes(run: Callable[[], Tensor], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that a forward pass saves; each counts once, and those of `besides` do not."""
    others = {x.untyped_storage().data_ptr() for x in besides}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x  # kept, so that no other takes its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    found = sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in others)
    del out
    return found


def alone_of(size: int, *, sequence_parallel: bool) -> TensorParallel:
    """The first of `size` tensor-parallel ranks, in a process of its own; what others would send is undefined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    sharing = [
        TensorParallel(size=count, group=dist.new_group(list(range(count))))
        for count in range(2, size)
        if size % count == 0
    ]
    return TensorParallel(
        size=size, group=dist.group.WORLD, sequence_parallel=sequence_parallel, sharing=tuple(sharing)
    )
