"""The conjugate collectives of tensor and sequence parallelism, as autograd functions.

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

from megatron_slm.errors import PeerError, SlmError
from megatron_slm.parallel.groups import DataParallel, TensorParallel

_T = TypeVar("_T")


def all_reduce_sum(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum of `x` over the tensor-parallel ranks, in a new tensor."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=tp.group)
    return x


def all_gather_dim0(x: Tensor, ranks: TensorParallel | DataParallel) -> Tensor:
    """The ranks' `x`, one after the other along dim 0: [n, ...] to [size * n, ...]."""
    out = x.new_empty((x.shape[0] * ranks.size, *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group)
    return out


def reduce_scatter_dim0(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's part of the sum over ranks, cut along dim 0: [size * n, ...] to [n, ...]."""
    out = x.new_empty((x.shape[0] // tp.size, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=tp.group)
    return out


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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _between_parts(communicate: Callable[..., Tensor], x: Tensor, tp: TensorParallel) -> Tensor:
    """Communication stays outside of what --compile-blocks compiles."""
    return communicate(x, tp)


def copy_to_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """Hand a replicated tensor to sharded work; its gradient is summed over the ranks."""
    return x if tp.size == 1 else _between_parts(_Copy.apply, x, tp)


def reduce_from_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum the ranks' partial results into a replicated tensor."""
    return x if tp.size == 1 else _between_parts(_Reduce.apply, x, tp)


def gather_sequence(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """The whole sequence from its parts: [s / size, b, d] to [s, b, d]."""
    return x_sbd if tp.size == 1 else _Gather.apply(x_sbd, tp)


def scatter_sequence_sum(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's part of the summed sequence: [s, b, d] to [s / size, b, d]."""
    return x_sbd if tp.size == 1 else _ScatterSum.apply(x_sbd, tp)


def enter_parallel(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """From the residual stream into sharded work, in the form that sequence parallelism asks for."""
    return gather_sequence(x_sbd, tp) if tp.sequence_parallel else copy_to_tensor_parallel(x_sbd, tp)


def leave_parallel(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """From sharded work back into the residual stream."""
    return scatter_sequence_sum(x_sbd, tp) if tp.sequence_parallel else reduce_from_tensor_parallel(x_sbd, tp)


_SIGNS_OF_A_LOST_PEER = ("gloo/transport", "pair closure", "Connection closed", "Connection reset", "Broken pipe")


@contextmanager
def peers_named(doing: str) -> Iterator[None]:
    """What a communication library raises inside becomes a `PeerError` that says what this rank was doing.

    Gloo raises a bare RuntimeError when a peer's connection closes and when a time-out is over; NCCL's errors
    have a class of their own.

    Raises:
        PeerError: a rank that this one communicates with is gone, or was silent for too long.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in _SIGNS_OF_A_LOST_PEER):
            raise
        raise PeerError(
            f"rank {dist.get_rank()}: {doing}",
            text.splitlines()[0].rpartition("] ")[2] if "gloo" in text else text.splitlines()[0],
            "has the answer of every other rank it needs within --distributed-timeout-minutes",
            "find the rank that failed first (its own error, or killed, or out of memory) and resume with --load",
        ) from error


@contextmanager
def together() -> Iterator[None]:
    """What any rank raises inside is raised on every rank, so that none waits for one that is gone.

    Collective over the world at its end; nothing inside may communicate. A rank without an error of its own
    raises the first one of the others. Where there is no world (a dry run) an error is simply raised.
    """
    if not dist.is_initialized():
        yield
        return
    mine: SlmError | None = None
    try:
        yield
    except SlmError as error:
        mine = error
    for found in [mine, *gather_objects(mine)]:
        if found is not None:
            raise found


def gather_objects(value: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """Every rank's value, by rank, on every rank. Collective over the group, or the world."""
    held: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(held, value, group=group)
    return held


def from_rank_0(value: _T) -> _T:
    """Rank 0's value, on every rank. Collective over the world, where there is one."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
