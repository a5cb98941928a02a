"""A checkpoint as the ranks of a large world would have saved it, written by one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def write_checkpoint(folder: Path, arch: Any, topology: Any, *, divisible_by: int, with_moments: bool = True) -> Path:
    """Write a checkpoint of `arch` after step 1 in `folder`; return its own folder. Every number in it is 1."""
    from megatron_slm.checkpoint.save import Writer
    from megatron_slm.checkpoint.snapshot import rank_files
    from megatron_slm.checkpoint.state import RunState

    writer = Writer(
        folder=folder, topology=topology, zero_stage=1, architecture=arch, tokenizer_fingerprint=None,
        sample_order="synthetic", extras=(), write_config=Path.touch, describe_data=lambda num_samples: {},
    )  # fmt: skip
    state = RunState(step=1, consumed_samples=1, adam_step=1 if with_moments else 0)
    temporary = folder / ".temporary"
    temporary.mkdir(parents=True)
    entries: dict[str, Any] = {}
    with mock.patch.object(os, "fsync"):  # thousands of files that no one will miss
        for rank, owned in enumerate(_fragments_by_rank(arch, topology, divisible_by)):
            tensor_rank = topology.coordinate(rank).tensor
            files = rank_files(owned, rank, tensor_rank=tensor_rank, with_moments=with_moments)
            entries |= writer.write(temporary, files, state, rank)
        return writer.commit(temporary, entries, state, {})


def _fragments_by_rank(arch: Any, topology: Any, divisible_by: int) -> Iterator[list[Any]]:
    """The fragments of every rank: its stage's parameters one after the other, cut evenly over the data ranks."""
    from megatron_slm.checkpoint.fragments import Fragment

    stages = {}
    for rank in range(topology.world_size):
        at = topology.coordinate(rank)
        key = at.pipeline, at.tensor
        if key not in stages:
            stages[key] = _parameters(arch, topology, *key, divisible_by)
        parameters = stages[key]
        total = sum(p.numel() for p in parameters)
        low, high = total * at.data // topology.data, total * (at.data + 1) // topology.data
        flat = torch.ones(high - low)
        owned, start = [], 0
        for parameter in parameters:
            begin, end = max(low - start, 0), min(high - start, parameter.numel())
            if begin < end:
                state = {"exp_avg": flat, "exp_avg_sq": flat}
                offset = start + begin - low
                owned.append(Fragment(parameter=parameter, begin=begin, end=end, flat=flat, offset=offset, state=state))
            start += parameter.numel()
        yield owned


def _parameters(arch: Any, topology: Any, stage: int, tensor: int, divisible_by: int) -> list[Any]:
    from megatron_slm.model.llama import layer_list
    from megatron_slm.model.partition import stage_bounds
    from megatron_slm.parallel.groups import TensorParallel
    from megatron_slm.parallel.layers import ParallelLayers

    layers = ParallelLayers(TensorParallel(size=topology.tensor, rank=tensor), vocabulary_divisible_by=divisible_by)
    bounds = stage_bounds(arch.num_layers, topology.pipeline)
    with torch.device("meta"):
        made = [maker.make() for maker in layer_list(arch, layers)[bounds[stage] : bounds[stage + 1]]]
    return [parameter for layer in made for parameter in layer.parameters()]
