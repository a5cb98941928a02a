"""Safetensors files named as in transformers: a single file, or numbered shards with their index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

from megatron_slm.checkpoint.tensor_file import Blocks, Entry, write_entries
from megatron_slm.convert.hf_source import SAFETENSORS


def plan_shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cut a model into files of at most `shard_bytes`, in order; a larger tensor gets a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_shards(folder: Path, entries: Sequence[Entry], blocks: Blocks, *, shard_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index."""
    shards = plan_shards(entries, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SAFETENSORS
        write_entries(folder / name, shard, blocks, {"format": "pt"})
        weight_map.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        total = {
            "total_parameters": sum(prod(entry.shape) for entry in entries),
            "total_size": sum(entry.num_bytes for entry in entries),
        }
        index = {"metadata": total, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2))
