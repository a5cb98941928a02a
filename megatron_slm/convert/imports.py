"""A Hugging Face folder as one of our checkpoints: weights at step 0, no moments."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from megatron_slm.checkpoint.format import (
    Manifest,
    file_entry,
    find_checkpoint,
    folder_name,
    sync_folder,
    versions,
    write_durably,
)
from megatron_slm.convert.hf_config import is_hf_folder
from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.convert.source import open_model
from megatron_slm.errors import WeightsError


def import_folder(hf: str, output: str) -> Path:
    """Write the weights of a Hugging Face Llama as a checkpoint in `output`.

    Returns:
        the committed checkpoint folder, for `--init-from` and `--reference-load` at any layout.

    Raises:
        WeightsError: not a Hugging Face Llama, or `output` holds something already.
    """
    if not is_hf_folder(Path(hf)):
        raise WeightsError("--hf", hf, "is a Hugging Face folder (with a config.json)", "check the path")
    model = open_model(hf, field="--hf")
    assert isinstance(model.source, HuggingFaceSource), "is_hf_folder was checked"
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise WeightsError("--output", output, "is a folder that does not exist yet, or is empty", "choose another")
    temporary = target / f".{folder_name(0)}.tmp"
    temporary.mkdir(parents=True)
    for number, (name, tensor) in enumerate(model.source.tensors()):
        if name == "lm_head.weight" and model.architecture.tied:
            continue  # some folders store the tied copy as well
        whole = {
            "name": name,
            "shape": list(tensor.shape),
            "dim": None,
            "start": 0,
            "length": 0,
            "begin": 0,
            "end": tensor.numel(),
        }
        tensors = {"0.weight": tensor.float().reshape(-1).clone()}
        save_file(tensors, temporary / f"weights_{number:05d}.safetensors", metadata={"pieces": json.dumps([whole])})
    fingerprint = None
    if model.tokenizer_folder is not None:
        fingerprint = _copy_tokenizer(model.tokenizer_folder, temporary / "tokenizer")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    Manifest(
        step=0,
        consumed_samples=0,
        adam_step=0,
        architecture=model.architecture,
        layout={"pipeline": 1, "data": 1, "tensor": 1},
        tokenizer_fingerprint=fingerprint,
        sample_order=None,
        files={str(path.relative_to(temporary)): file_entry(path) for path in files},
        versions=dict(versions()),
    ).write(temporary)
    os.rename(temporary, target / folder_name(0))
    sync_folder(target)
    write_durably(target / "latest", folder_name(0).encode())
    return find_checkpoint(target)


def _copy_tokenizer(source: Path, target: Path) -> str:
    from megatron_slm.data.tokenizers import build_tokenizer

    target.mkdir()
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
    for name in names:
        if (source / name).exists():
            shutil.copy2(source / name, target)
    return build_tokenizer("HuggingFaceTokenizer", str(target)).fingerprint()
