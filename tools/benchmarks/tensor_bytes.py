"""The most bytes of tensors alive at once, counted from the allocations of every operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVER_A_FILE = torch.ops.aten.set_.source_Storage
"""Makes a tensor over memory that is there, as safetensors does over a file's pages."""


class Peak(TorchDispatchMode):
    """Counts inside of a `with` block.

    Args:
        given: tensors that were there before, which do not count.

    Attributes:
        peak_bytes: the most so far.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._given = [x.untyped_storage() for x in given]
        self._alive: dict[int, int] = {storage._cdata: 0 for storage in self._given}
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._alive:
                held = 0 if x.is_meta or func is _OVER_A_FILE else storage.nbytes()
                self._alive[key] = held
                self._now += held
                self.peak_bytes = max(self.peak_bytes, self._now)
                weakref.finalize(storage, self._end, key)
        return out

    def _end(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)
