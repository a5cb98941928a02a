"""A checkpoint as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.convert.hf_config import hf_config
from megatron_slm.convert.source import open_model
from megatron_slm.errors import CheckpointError, WeightsError

SHARD_BYTES = 4 * 2**30
"""A new safetensors file is begun when one would grow beyond this; also about what is held in memory."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_checkpoint(load: str, output: str, *, dtype: str = "float32") -> Path:
    """Write the newest complete checkpoint in `load` as a folder that `from_pretrained` loads.

    The weights are the fp32 master weights, cast to `dtype`; the tokenizer travels along. The folder appears
    under its name only when it is whole.

    Raises:
        CheckpointError, WeightsError: no complete checkpoint, or the output folder is there already.
    """
    model = open_model(load, field="--load")
    if not isinstance(model.source, CheckpointSource):
        raise CheckpointError("--load", load, "is a checkpoint of ours", "it is a Hugging Face folder already")
    final = Path(output)
    if final.exists() and any(final.iterdir()):
        raise WeightsError("--output", output, "is a folder that does not exist yet, or is empty", "choose another")
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    bos_id = eos_id = None
    if model.tokenizer_folder is not None:
        for path in model.tokenizer_folder.iterdir():
            shutil.copy2(path, temporary)
        bos_id, eos_id = _special_ids(model.tokenizer_folder)
    hf_config(model.architecture, dtype=dtype, bos_id=bos_id, eos_id=eos_id).save_pretrained(temporary)
    source = model.source
    named = ((name, source.whole(name).to(DTYPES[dtype])) for name in source.shapes())
    write_shards(temporary, named)
    if final.exists():
        final.rmdir()
    temporary.rename(final)
    return final


def _special_ids(folder: Path) -> tuple[int | None, int | None]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer.bos_token_id, tokenizer.eos_token_id


def write_shards(folder: Path, named: Iterator[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards with an index, holding one shard at a time."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in named:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(shards) == 1:
        (folder / "shard-00000.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i:05d}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
