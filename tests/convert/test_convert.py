"""Hugging Face in and out, and errors of folders that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from megatron_slm.config import Architecture
from megatron_slm.convert.export import export_checkpoint, write_shards
from megatron_slm.convert.hf_config import hf_config, read_architecture
from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.source import open_model
from megatron_slm.convert.verify import verify
from megatron_slm.errors import CheckpointError, WeightsError
from megatron_slm.parallel.shards import Part
from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world


def test_a_trained_run_exports_what_it_trained(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(
        corpus, tmp_path / "run", save_interval=5, pipeline_model_parallel_size=2, tensor_model_parallel_size=2,
        no_untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    run_world(train_and_report, 4, values)
    out = export_checkpoint(str(tmp_path / "run" / "checkpoints"), str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    assert verify(str(out), str(tmp_path / "run" / "checkpoints"), None) <= 1e-4
    tokens = torch.arange(30)[None] % 97
    assert torch.isfinite(model(tokens).logits).all()


def test_verify_fails_on_a_changed_weight(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    import_folder(str(hf), str(tmp_path / "ours"))
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    command = [
        sys.executable,
        "tools/convert_checkpoint.py",
        "verify",
        "--hf",
        str(hf),
        "--load",
        str(tmp_path / "ours"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("max |Δ| = ")
    assert "differ by more than" in done.stdout
    done = subprocess.run(command[:-2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tool_says_errors_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", "export", "--load", str(tmp_path), "--output", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: --load")]
    assert "Traceback" not in done.stderr


def test_old_and_new_ways_to_write_rope(tmp_path: Path) -> None:
    raw = LlamaConfig(num_attention_heads=4, hidden_size=32).to_dict()
    raw.pop("rope_parameters")
    old = {**raw, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    arch = read_architecture(tmp_path)
    assert arch.rotary_base == 5e5
    assert arch.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 5e5, "rope_scaling": None}))
    assert read_architecture(tmp_path).rope_scaling == {}
