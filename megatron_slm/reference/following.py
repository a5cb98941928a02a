"""A reference that follows the model: a moving average of its weights, or a copy of some steps ago."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.checkpoint.slices import TABLE, describe_slice, file_name
from megatron_slm.checkpoint.snapshot import TensorFile
from megatron_slm.checkpoint.weights import WeightSource, read_range
from megatron_slm.parallel.shards import parts_of, parts_with_offsets
from megatron_slm.parallel.topology import Coordinate
from megatron_slm.reference.frozen import FrozenStage

FILE_KIND = "reference"
"""Prefix of its files in a checkpoint."""


class FollowingReference:
    """Updates this rank's stage of a reference from the model's weights here, without communication.

    Both are cut alike, so that every rank has the weights that its part of the average needs, and data-parallel ranks
    compute the same bits. The average is fp32; the reference computes with it rounded to its dtype. The model's weights
    are those that it computes with: in bf16 runs, the rounded ones.

    Args:
        source: the average so far: the reference's own weights at the start of a run, or a checkpoint's.
        decay: weight of the average in an update; 0 replaces it.
        place: of this rank; the first data-parallel and context-parallel rank writes its stage into checkpoints.
    """

    def __init__(self, reference: FrozenStage, source: WeightSource, *, decay: float, place: Coordinate) -> None:
        self.decay, self.place, self._reference = decay, place, reference
        self._parameters = list(reference.parameters())
        self._averages = [
            read_range(parameter, source, "weight", 0, parameter.numel()).view(parameter.shape).to(parameter.device)
            for parameter in self._parameters
        ]
        self._copy()

    @torch.no_grad()
    def update(self, model: Iterable[nn.Parameter]) -> None:
        """Move the average towards the model's weights.

        Args:
            model: the parameters of this rank's stage of the model, whole.
        """
        weights = {parts_of(parameter): parameter.data for parameter in model}
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            average.mul_(self.decay).add_(weights[parts_of(parameter)], alpha=1 - self.decay)
        self._copy()

    def _copy(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data.copy_(average)

    def files(self, rank: int) -> list[TensorFile]:
        """List the files of a checkpoint that this rank writes: its slices of logical tensors, as a view that the next
        update changes.

        A tied output weight is the first stage's to write, and replicated weights are tensor rank 0's.
        """
        if self.place.data > 0 or self.place.context > 0:
            return []
        tensors: dict[str, Tensor] = {}
        slices: list[dict[str, Any]] = []
        for (name, parameter), average in zip(self._reference.named_parameters(), self._averages, strict=True):
            for part, offset in parts_with_offsets(parameter):
                if name.startswith("tied_output.") or (part.dim is None and self.place.tensor > 0):
                    continue
                tensors[f"{len(slices)}.weight"] = average.flatten()[offset : offset + part.numel]
                slices.append(describe_slice(part, 0, part.numel))
        return [TensorFile(file_name(FILE_KIND, rank), tensors, {TABLE: json.dumps(slices)})]
