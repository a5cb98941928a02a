"""The tensors that one rank saves: views into the optimizer's memory, or copies that training cannot change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint.fragments import Fragment
from megatron_slm.checkpoint.slices import TABLE, describe_slice, file_name
from megatron_slm.checkpoint.weights import Quantity
from megatron_slm.device import device_rng_state, synchronize
from megatron_slm.parallel.shards import parts_with_offsets

RNG_CPU, RNG_DEVICE = "rng.cpu", "rng.device"
"""Random states of a rank, in its file of weights."""


@dataclass(frozen=True)
class TensorFile:
    """A file to write: its name, its tensors by name, and its header's metadata."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def rank_files(fragments: Iterable[Fragment], rank: int, *, tensor_rank: int, with_moments: bool) -> list[TensorFile]:
    """List this rank's files: the slices of logical tensors that it writes, and its random states.

    The tensors of weights and moments are views: they change with the next optimizer step.

    Args:
        fragments: the fragments that this rank owns.
        with_moments: Adam has moments, which it creates at its first step.
    """
    owned = [fragment for fragment in fragments if _is_ours_to_write(fragment, tensor_rank)]
    weights = _fragment_file(file_name("weights", rank), owned, ("weight",))
    weights.tensors[RNG_CPU] = torch.get_rng_state()
    device_state = device_rng_state()
    if device_state is not None:
        weights.tensors[RNG_DEVICE] = device_state
    if not with_moments:
        return [weights]
    return [weights, _fragment_file(file_name("optimizer", rank), owned, ("exp_avg", "exp_avg_sq"))]


class SnapshotMemory:
    """Host memory for copies, reused from save to save: fresh pages cost more than the copy itself."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    def copy(self, files: list[TensorFile]) -> list[TensorFile]:
        """Copy the files' tensors to the host; valid until the next call."""
        copies = [
            TensorFile(
                file.name, {key: self._copy((file.name, key), x) for key, x in file.tensors.items()}, file.metadata
            )
            for file in files
        ]
        synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        held = self._held.get(key)
        on_device = tensor.device.type != "cpu"
        if held is None or held.shape != tensor.shape:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            self._held[key] = held
        return held.copy_(tensor, non_blocking=on_device)


def _is_ours_to_write(fragment: Fragment, tensor_rank: int) -> bool:
    """True for tensor rank 0's copy of replicated weights, and the first stage's of a tied one."""
    parameter = fragment.parameter
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return tensor_rank == 0 or bool(getattr(parameter, "tensor_model_parallel", False))


def _fragment_file(name: str, owned: list[Fragment], quantities: tuple[Quantity, ...]) -> TensorFile:
    """Describe one file: 1-D tensors keyed `number.quantity`, and in its header the slice of each number."""
    tensors: dict[str, Tensor] = {}
    slices: list[dict[str, Any]] = []
    for fragment in owned:
        for part, offset in parts_with_offsets(fragment.parameter):
            low, high = max(fragment.begin, offset), min(fragment.end, offset + part.numel)
            if low >= high:
                continue
            for quantity in quantities:
                held = fragment.view(quantity)[low - fragment.begin : high - fragment.begin]
                tensors[f"{len(slices)}.{quantity}"] = held
            slices.append(describe_slice(part, low - offset, high - offset))
    return TensorFile(name, tensors, {TABLE: json.dumps(slices)})
