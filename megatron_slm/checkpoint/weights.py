"""Sources of weights: one protocol for checkpoints, Hugging Face folders and random initial values."""

from __future__ import annotations

from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.parallel.random import normal_
from megatron_slm.parallel.shards import Part, parts_with_offsets

Quantity = Literal["weight", "exp_avg", "exp_avg_sq"]
"""A weight (fp32 master), or one of Adam's two moments of it."""


class WeightSource(Protocol):
    """Reads logical tensors, a range at a time."""

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Read elements [begin, end) of the flattened `part`, 1-D, fp32 or the stored dtype.

        Raises:
            SlmError: the tensor is missing or has another shape.
        """
        ...


class RandomWeights:
    """Initial weights by name and seed, the same at every layout.

    Matrices are N(0, std); those that write into the residual stream N(0, std / sqrt(2 layers)), as
    Megatron-LM does; norms are 1 (or 0, where they multiply by 1 + weight) and biases 0.
    """

    def __init__(self, arch: Architecture, seed: int) -> None:
        self.arch, self.seed = arch, seed
        self._last: tuple[str, Tensor] | None = None

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Make elements [begin, end) of the flattened `part`; moments are zero."""
        if quantity != "weight":
            return torch.zeros(end - begin)
        return cut_range(self._whole(part), part, begin, end)

    def _whole(self, part: Part) -> Tensor:
        if self._last is None or self._last[0] != part.name:
            self._last = (part.name, self._make(part))
        return self._last[1]

    def _make(self, part: Part) -> Tensor:
        if part.name.endswith("norm.weight"):
            return torch.zeros(part.shape) if self.arch.zero_centered_norms else torch.ones(part.shape)
        if part.name.endswith(".bias"):
            return torch.zeros(part.shape)
        std = self.arch.initializer_range
        if part.name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self.arch.num_layers) ** 0.5
        return normal_(part.name, part.shape, std=std, seed=self.seed)


def cut_range(whole: Tensor, part: Part, begin: int, end: int) -> Tensor:
    """Cut elements [begin, end) of the flattened `part` from a whole logical tensor."""
    held = whole if part.dim is None else whole.narrow(part.dim, part.start, part.length)
    return held.reshape(-1)[begin:end]


def read_range(parameter: nn.Parameter, source: WeightSource, quantity: Quantity, begin: int, end: int) -> Tensor:
    """Read elements [begin, end) of the flattened parameter, fp32 on the CPU; padding reads as zero."""
    out = torch.zeros(end - begin)
    for part, offset in parts_with_offsets(parameter):
        low, high = max(begin, offset), min(end, offset + part.numel)
        if low < high:
            out[low - begin : high - begin] = source.read(quantity, part, low - offset, high - offset)
    return out


def fill_module(module: nn.Module, source: WeightSource) -> None:
    """Load the weights of a module that no optimizer owns (the reference, a dense model)."""
    for parameter in module.parameters():
        numel = prod(parameter.shape)
        parameter.data.copy_(read_range(parameter, source, "weight", 0, numel).view(parameter.shape))
