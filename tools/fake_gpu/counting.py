"""Counts what a GPU would be told to do: kernels, bytes, FLOPs, and the points where the host waits for it."""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_VIEWS = frozenset(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias split split_with_sizes "
    "as_strided unbind narrow reshape empty empty_like new_empty empty_strided new_empty_strided _reshape_alias "
    "lift_fresh is_same_size diagonal chunk unsafe_split device sym_size sym_numel sym_stride sym_storage_offset "
    "layout dim numel size stride is_contiguous storage_offset set_ resize_ record_stream".split()
)
"""Operations that launch no kernel."""
_WRITES_ALONE = frozenset(("fill_", "zero_"))
_PICKS_ROWS = frozenset(("index", "index_select", "embedding", "gather"))
_PROJECT = "/megatron_slm/"


class Launch(NamedTuple):
    """One kernel."""

    op: str
    num_bytes: int
    """Read and written."""
    flops: int
    """Of matrix products and attention; 0 of the rest."""
    place: str
    """`file:line` of the project that asked for it, in the package; `(backward of)` before it for autograd's."""


class Sync(NamedTuple):
    """A point where the host waits for the device."""

    place: str
    why: str


@dataclass
class Values:
    """Results of data-dependent operations on a device without values."""

    rows_of: Callable[[str, int], int] = lambda place, length: math.ceil(0.6 * length)
    """Rows that a mask of a length selects, by the place that asks."""
    number: Callable[[str], Any] = lambda place: 1
    """A number read to the host."""


@dataclass
class Counts:
    """Launches and synchronizations."""

    launches: list[Launch] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)

    def by_place(self) -> dict[str, int]:
        """Bytes by place."""
        tally: Tally[str] = Tally()
        for launch in self.launches:
            tally[launch.place] += launch.num_bytes
        return dict(tally)


class Counter(TorchDispatchMode):
    """Inside, everything asked of the device is counted; entered inside a FakeTensorMode."""

    def __init__(self, values: Values | None = None) -> None:
        super().__init__()
        self.values = values or Values()
        self.counts = Counts()
        self._place_of: dict[tuple[int, int], str] = {}

    def take(self) -> Counts:
        """Return what was counted since the last call."""
        taken, self.counts = self.counts, Counts()
        return taken

    def launch(self, op: str, tensors: Sequence[Tensor | None], *, flops: int = 0) -> None:
        """Count a kernel that torch does not know of, which reads or writes each of the tensors once."""
        for x in tensors:
            assert x is None or x.is_cuda, f"{op} gets a tensor of {x.device if x is not None else None}"
        num_bytes = sum(_bytes(x) for x in tensors if x is not None)
        self.counts.launches.append(Launch(op, num_bytes, flops, place()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, kernels are not counted: they are parts of one that `launch` counts."""
        counts, self.counts = self.counts, Counts(syncs=self.counts.syncs)
        try:
            yield
        finally:
            self.counts = counts

    def wait(self, why: str) -> None:
        """Count a host synchronization."""
        self.counts.syncs.append(Sync(place(), why))

    def __enter__(self) -> Counter:
        self._tolist, counter = Tensor.tolist, self

        def tolist(x: Tensor) -> Any:
            if not (isinstance(x, FakeTensor) and x.is_cuda):
                return counter._tolist(x)
            counter.wait("tolist")
            return _nested(counter.values.number(place()), list(x.shape))

        FakeTensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del FakeTensor.tolist

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it; the ones that depend on values get theirs from `Values`."""
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_pin_memory":
            pinned = inputs[0].clone()
            pinned.is_pinned_memory = True  # type: ignore[attr-defined]
            return pinned
        if name == "is_pinned":
            return getattr(inputs[0], "is_pinned_memory", False)
        if any(x.is_cuda for x in inputs):
            found = self._data_dependent(name, args, inputs)
            if found is not NotImplemented:
                return found
        _check_dtypes(name, args, inputs)
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in ("_to_copy", "copy_") and len({x.device.type for x in (*inputs, *outputs)}) > 1:
            self._note_copy(name, args, kwargs, inputs)
        self._note(name, func, args, kwargs, inputs, outputs)
        return out

    def _data_dependent(self, name: str, args: Any, inputs: list[Tensor]) -> Any:
        """The result of an operation whose shape or value the host must wait for; NotImplemented of any other."""
        if name == "nonzero":
            self.wait("nonzero")
            rows = self.values.rows_of(place(), inputs[0].shape[0])
            out = torch.empty(rows, inputs[0].dim(), dtype=torch.int64, device=inputs[0].device)
            self.launch("nonzero", [inputs[0], out])
            return out
        if name == "_local_scalar_dense":
            self.wait("item")
            return self.values.number(place())
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.wait("index by a mask")
            if name == "index":
                rows = self.values.rows_of(place(), args[0].shape[0])
                out = args[0].new_empty((rows, *args[0].shape[1:]))
                self.launch("index", [*inputs, out])
                return out
        return NotImplemented

    def _note_copy(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
        non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if not non_blocking:
            self.wait("copy between host and device")
        elif not all(getattr(x, "is_pinned_memory", False) for x in inputs if x.device.type == "cpu"):
            self.wait("copy from memory that is not pinned")

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        touched = {id(x): x for x in (*inputs, *outputs)}
        if name in _VIEWS or not any(x.is_cuda for x in touched.values()):
            return
        if name == "_to_copy" and all(any(o is i for i in inputs) for o in outputs):
            return
        num_bytes = sum(map(_bytes, touched.values()))
        if name in _WRITES_ALONE:
            num_bytes = _bytes(inputs[0])
        elif name in _PICKS_ROWS:
            num_bytes = 2 * sum(map(_bytes, outputs))
        elif name == "copy_":
            num_bytes = sum(map(_bytes, inputs[:2]))
        elif name.endswith("_") and not name.startswith("_"):
            num_bytes += _bytes(inputs[0])  # read and written
        flops = _flops(func, args, kwargs, outputs)
        self.counts.launches.append(Launch(name, num_bytes, flops, self._origin()))

    def _origin(self) -> str:
        """The line that asks for an operation; of one that autograd asks for, the line it differentiates."""
        here = place()
        node = torch._C._current_autograd_node()
        if node is None:
            number = torch.autograd._get_sequence_nr() - 1
            self._place_of[threading.get_ident(), number] = here
            return here
        if here != NOWHERE:
            return here
        number = node._sequence_nr()
        origins = [where for (_, one), where in self._place_of.items() if one == number]
        return f"(backward of) {origins[0]}" if origins else NOWHERE


NOWHERE = "(autograd)"


def place() -> str:
    """The innermost line of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _PROJECT in name:
            return f"{name.rpartition(_PROJECT)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return NOWHERE


_PRODUCTS = frozenset(("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"))
_SAME_DTYPE = frozenset(("index_put", "index_put_", "index_add_", "index_copy_", "scatter", "scatter_", "dot", "mv"))


def _check_dtypes(name: str, args: Any, inputs: list[Tensor]) -> None:
    """Raise what a GPU's kernels raise and meta kernels let through: factors, or places and values, of two dtypes."""
    if not any(x.is_cuda for x in inputs):
        return
    factors = []
    if name in _PRODUCTS:
        factors = args[1:3] if name.startswith(("addmm", "baddbmm")) else args[:2]
    elif name in _SAME_DTYPE:
        factors = [x for x in inputs if x.dtype not in (torch.int64, torch.bool)]
    if len({x.dtype for x in factors}) > 1:
        raise RuntimeError(f"{name}: expected tensors of the same dtype, but got {[x.dtype for x in factors]}")


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _nested(value: Any, shape: list[int]) -> Any:
    return [_nested(value, shape[1:]) for _ in range(shape[0])] if shape else value


def _flops(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return 0
    kwargs = {name: value for name, value in kwargs.items() if name not in ("out", "out_dtype")}
    tensors = [x for x in args if not isinstance(x, torch.dtype)]
    flops = int(count(*tensors, **kwargs, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs)))
    causal = "attention" in func._schema.name and any(x is True for x in args)
    return flops // 2 if causal else flops
