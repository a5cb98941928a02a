"""Summary of a model folder, from its headers and small files alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.convert.card import read_origin
from megatron_slm.convert.families import family_of
from megatron_slm.convert.hf_config import read_config
from megatron_slm.convert.source import open_model
from megatron_slm.convert.tensors import check_tensors


def inspect_model(path: str) -> dict[str, Any]:
    """Return kind, family, architecture, sizes, dtypes, files and origin of a Hugging Face folder or a checkpoint.

    Raises:
        WeightsError, CheckpointError: the folder is neither, or its tensors contradict its configuration.
    """
    model = open_model(path, field="PATH", checksums=False)
    check_tensors(model.architecture, model.source, field="PATH")
    dtypes = model.source.dtypes()
    files = sorted(set(model.source.files().values()))
    out: dict[str, Any] = {"kind": "Hugging Face folder", "path": str(model.source.folder)}
    if isinstance(model.source, CheckpointSource):
        manifest = Manifest.read(model.source.folder)
        out |= {
            "kind": "checkpoint",
            "family": family_of(model.architecture).model_type if model.origin_folder is None else None,
            "step": manifest.step,
            "samples": manifest.state.consumed_samples,
            "tokens_seen": manifest.state.tokens_seen,
            "tokens_kept": manifest.state.tokens_kept,
            "layout": manifest.layout,
            "written_by": manifest.versions,
            "origin": read_origin(model.source.folder),
        }
    if model.origin_folder is not None:
        out["family"] = read_config(model.origin_folder).get("model_type")
    return out | {
        "parameters": model.architecture.num_parameters,
        "dtypes": dict(Counter(str(dtype).removeprefix("torch.") for dtype in dtypes.values())),
        "weight_files": {Path(file).name: Path(file).stat().st_size for file in files},
        "tokenizer": model.tokenizer_folder is not None,
        "architecture": asdict(model.architecture),
    }
