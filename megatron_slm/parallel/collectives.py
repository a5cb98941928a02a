"""Conjugate collectives of tensor and sequence parallelism as autograd functions, and collectives of Python objects.

Each pair is the other's transpose (Megatron-LM, `core/tensor_parallel/mappings.py`):

| function | forward | backward |
|---|---|---|
| `copy_to_tensor_parallel` | identity | all-reduce |
| `reduce_from_tensor_parallel` | all-reduce | identity |
| `gather_sequence` | all-gather along dim 0 | reduce-scatter along dim 0 |
| `scatter_sequence_sum` | reduce-scatter along dim 0 | all-gather along dim 0 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.errors import PeerError
from megatron_slm.parallel.groups import ContextParallel, DataParallel, TensorParallel

_T = TypeVar("_T")


def all_reduce_sum(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return the sum of `x` over the tensor-parallel ranks, in a new tensor."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=tp.group)
    return x


def all_gather_dim0(x: Tensor, ranks: TensorParallel | DataParallel | ContextParallel) -> Tensor:
    """Concatenate the ranks' `x` along dim 0, by rank: [n, ...] to [size * n, ...]."""
    out = x.new_empty((x.shape[0] * ranks.size, *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group)
    return out


def reduce_scatter_dim0(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return this rank's slice, along dim 0, of the sum over ranks: [size * n, ...] to [n, ...]."""
    out = x.new_empty((x.shape[0] // tp.size, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=tp.group)
    return out


def start_all_gather_dim0(x: Tensor, ranks: TensorParallel | DataParallel) -> tuple[Tensor, dist.Work]:
    """Start `all_gather_dim0`; the result is there after the work was waited for."""
    out = x.new_empty((x.shape[0] * ranks.size, *x.shape[1:]))
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group, async_op=True)


def start_reduce_scatter_dim0(x: Tensor, tp: TensorParallel) -> tuple[Tensor, dist.Work]:
    """Start `reduce_scatter_dim0`; the result is there, and `x` free again, after the work was waited for."""
    out = x.new_empty((x.shape[0] // tp.size, *x.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=tp.group, async_op=True)


def broadcast(x: Tensor, tp: TensorParallel) -> Tensor:
    """The first tensor-parallel rank's `x`, in a new tensor."""
    x = x.contiguous().clone()
    dist.broadcast(x, group=tp.group, group_src=0)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return all_reduce_sum(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return all_gather_dim0(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim0(grads[0], ctx.tp), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return reduce_scatter_dim0(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim0(grads[0], ctx.tp), None


def _call(communicate: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return communicate(*arguments)


_communicate = _call


def outside_of_compiled_blocks(communicate: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function that communicates; a compiled block is cut there (`keep_out_of_compiled_blocks`)."""
    return _communicate(communicate, *arguments)


def keep_out_of_compiled_blocks() -> None:
    """Keep communication out of the blocks that --compile-blocks compiles; call it before they are compiled.

    torch's compiler takes seconds to import, so a process that compiles nothing does not import it.
    """
    global _communicate
    _communicate = torch.compiler.disable(_call)


def copy_to_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """Pass a replicated tensor to sharded layers; its gradient is summed over the ranks."""
    return x if tp.size == 1 else _communicate(_Copy.apply, x, tp)


def reduce_from_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum the ranks' partial results into a replicated tensor."""
    return x if tp.size == 1 else _communicate(_Reduce.apply, x, tp)


def gather_sequence(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """Gather the whole sequence: [s / size, b, d] to [s, b, d]."""
    return x_sbd if tp.size == 1 else _Gather.apply(x_sbd, tp)


def gather_from(part: Tensor, ranks: TensorParallel | ContextParallel) -> Tensor:
    """Concatenate the ranks' parts along dim 0, by rank; the gradient of each is summed over the ranks."""
    return _communicate(_Gather.apply, part, ranks)


def scatter_sequence_sum(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """Sum over the ranks and return this rank's positions: [s, b, d] to [s / size, b, d]."""
    return x_sbd if tp.size == 1 else _ScatterSum.apply(x_sbd, tp)


def enter_parallel_region(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """Bring the residual stream into sharded layers, gathered under sequence parallelism."""
    return gather_sequence(x_sbd, tp) if tp.sequence_parallel else copy_to_tensor_parallel(x_sbd, tp)


def leave_parallel_region(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """Sum sharded results back into the residual stream, scattered under sequence parallelism."""
    return scatter_sequence_sum(x_sbd, tp) if tp.sequence_parallel else reduce_from_tensor_parallel(x_sbd, tp)


_LOST_PEER_MESSAGES = ("gloo/transport", "pair closure", "Connection closed", "Connection reset", "Broken pipe")


@contextmanager
def translate_peer_errors(doing: str) -> Iterator[None]:
    """Translate errors of the communication library, inside the context, into a `PeerError` naming `doing`.

    Gloo raises a bare RuntimeError when a peer closes its connection or a time-out expires; NCCL's errors have a
    class of their own.

    Raises:
        PeerError: another rank is gone, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(message in text for message in _LOST_PEER_MESSAGES):
            raise
        raise PeerError(
            f"rank {dist.get_rank()}: {doing}: connection",
            text.splitlines()[0].rpartition("] ")[2] if "gloo" in text else text.splitlines()[0],
            "stay open, and carry an answer within --distributed-timeout-minutes",
            "find the rank that failed first (its own error, killed, or out of memory) and resume with --load",
        ) from error


def all_gather_objects(value: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """Return every rank's value, by rank. Collective over the group, or the world."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_from_rank_0(value: _T) -> _T:
    """Return rank 0's value on every rank. Collective over the world; without a process group, return `value`."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
