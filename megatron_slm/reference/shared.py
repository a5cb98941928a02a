"""Layers of a frozen model whose weights the data-parallel ranks share, each gathered just before it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.weights import WeightSource, copy_range
from megatron_slm.parallel.collectives import start_all_gather_dim0
from megatron_slm.parallel.groups import DataParallel


class SharedLayer:
    """A layer's weights, one after the other in a flat tensor of which each data-parallel rank holds an equal share.

    Args:
        layer: its parameters were made `without_values` (`parallel/shards.py`), which they have again once released.
    """

    def __init__(self, layer: nn.Module, dp: DataParallel, *, device: torch.device) -> None:
        self._dp = dp
        self._parameters = [(parameter, parameter.data) for parameter in layer.parameters()]
        size = sum(parameter.numel() for parameter, _ in self._parameters)
        dtype = self._parameters[0][0].dtype
        self._share = torch.zeros(ceil_div(size, dp.size), dtype=dtype, device=device)
        self._gathered: Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements of this rank's share."""
        return self._share.numel()

    def fill(self, source: WeightSource) -> None:
        """Load this rank's share."""
        first = self._dp.rank * self._share.numel()
        last, offset = first + self._share.numel(), 0
        for parameter, _ in self._parameters:
            begin, end = max(first, offset), min(last, offset + parameter.numel())
            if begin < end:
                target = self._share[begin - first : end - first]
                copy_range(target, parameter, source, "weight", begin - offset, end - offset)
            offset += parameter.numel()

    def start(self) -> None:
        """Start to gather the weights, unless they are here. Collective over the data-parallel ranks."""
        if self._gathered is None:
            self._gathered, self._work = start_all_gather_dim0(self._share, self._dp)

    def finish(self) -> None:
        """Wait for the weights that `start` gathers, and give the layer its parameters."""
        if self._work is None:
            return
        self._work.wait()
        self._work, offset = None, 0
        assert self._gathered is not None, "gathering was started"
        for parameter, _ in self._parameters:
            parameter.data = self._gathered[offset : offset + parameter.numel()].view(parameter.shape)
            offset += parameter.numel()

    def release(self) -> None:
        """Free the weights that other ranks hold."""
        for parameter, without_values in self._parameters:
            parameter.data = without_values
        self._gathered = None


class SharedLayers:
    """The layers of a model, of which one computes while the next is gathered.

    Args:
        kept: the layer whose weights are used after all layers, too, until `release`.
    """

    def __init__(self, layers: Sequence[nn.Module], dp: DataParallel, *, kept: nn.Module, device: torch.device) -> None:
        self._layers = layers
        self._shared = [SharedLayer(layer, dp, device=device) for layer in layers]
        self._kept = next(shared for shared, layer in zip(self._shared, layers, strict=True) if layer is kept)

    @property
    def num_elements(self) -> int:
        """Number of elements that this rank holds at all times."""
        return sum(shared.num_elements for shared in self._shared)

    def fill(self, source: WeightSource) -> None:
        """Load this rank's share of every layer."""
        for shared in self._shared:
            shared.fill(source)

    def in_turn(self) -> Iterator[nn.Module]:
        """Yield the layers in their order, each with its weights. Collective over the data-parallel ranks."""
        self._shared[0].start()
        for layer, (shared, following) in zip(self._layers, pairwise([*self._shared, None]), strict=True):
            assert shared is not None, "only the last one has no following one"
            shared.finish()
            if following is not None:
                following.start()
            yield layer
            if shared is not self._kept:
                shared.release()

    def release(self) -> None:
        """Free the weights of the layer that was kept."""
        self._kept.release()
