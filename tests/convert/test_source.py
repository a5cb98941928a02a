"""A model folder's checksum tells apart whatever would give other losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.source import open_model
from megatron_slm.parallel.shards import Part, cut_range
from tests.support.runs import save_hf_llama


def checksum(folder: Path) -> str:
    return open_model(str(folder), field="--reference-load").content_sha256()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_hf_llama(tmp_path / "hf")


def changed_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def test_a_hugging_face_folder(folder: Path, tmp_path: Path) -> None:
    before = checksum(folder)
    assert checksum(shutil.copytree(folder, tmp_path / "copy")) == before
    changed_config(tmp_path / "copy", transformers_version="0")
    assert checksum(tmp_path / "copy") == before, "what does not change a loss does not count"
    changed_config(tmp_path / "copy", rms_norm_eps=1e-4)
    assert checksum(tmp_path / "copy") != before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert checksum(folder) != before


def test_one_of_our_checkpoints(folder: Path, tmp_path: Path) -> None:
    imported = [import_folder(str(folder), str(tmp_path / name)) for name in ("one", "same")]
    other = import_folder(str(save_hf_llama(tmp_path / "hf1", seed=1)), str(tmp_path / "other"))
    one, same = (checksum(Path(path)) for path in imported)
    assert one == same
    assert checksum(Path(other)) != one


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_any_elements_of_a_part_are_read(folder: Path, dim: int | None) -> None:
    source, name = HuggingFaceSource(folder), "model.layers.0.mlp.down_proj.weight"
    whole = load_file(folder / "model.safetensors")[name]
    length = 0 if dim is None else whole.shape[dim] // 2
    part = Part(name=name, shape=tuple(whole.shape), dim=dim, start=length, length=length)
    width = part.local_shape[1]
    for begin, end in ((0, part.numel), (1, 2), (width - 1, 2 * width + 3), (3 * width, 4 * width), (5, 5)):
        assert torch.equal(source.read("weight", part, begin, end), cut_range(whole, part, begin, end))
