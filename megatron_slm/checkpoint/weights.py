"""Sources of weights: one protocol for checkpoints, Hugging Face folders and random initial values."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.parallel.random import normal_range
from megatron_slm.parallel.shards import Part, parts_with_offsets

Quantity = Literal["weight", "exp_avg", "exp_avg_sq"]
"""A weight (fp32 master), or one of Adam's two moments of it."""


READ_ELEMENTS = 2**24
"""The most elements that pass through the host's memory at once while weights are filled."""


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

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Make elements [begin, end) of the flattened `part`, and no others of a large tensor; moments are zero."""
        if quantity != "weight" or part.name.endswith(".bias"):
            return torch.zeros(end - begin)
        if part.name.endswith("norm.weight"):
            return torch.full((end - begin,), 0.0 if self.arch.zero_centered_norms else 1.0)
        std = self.arch.initializer_range
        if part.name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self.arch.num_layers) ** 0.5
        return normal_range(part, begin, end, std=std, seed=self.seed)


def read_range(parameter: nn.Parameter, source: WeightSource, quantity: Quantity, begin: int, end: int) -> Tensor:
    """Read elements [begin, end) of the flattened parameter, fp32 on the CPU; padding reads as zero."""
    out = torch.zeros(end - begin)
    for part, offset in parts_with_offsets(parameter):
        low, high = max(begin, offset), min(end, offset + part.numel)
        if low < high:
            out[low - begin : high - begin] = source.read(quantity, part, low - offset, high - offset)
    return out


def copy_range(
    target: Tensor, parameter: nn.Parameter, source: WeightSource, quantity: Quantity, begin: int, end: int
) -> None:
    """Copy elements [begin, end) of the flattened parameter into a flat tensor, through little of the host's memory."""
    for low in range(begin, end, READ_ELEMENTS):
        high = min(low + READ_ELEMENTS, end)
        target[low - begin : high - begin].copy_(read_range(parameter, source, quantity, low, high))


def fill_module(module: nn.Module, source: WeightSource) -> None:
    """Load the weights of a module that no optimizer owns (the reference, a dense model)."""
    for parameter in module.parameters():
        copy_range(parameter.data.view(-1), parameter, source, "weight", 0, parameter.numel())
