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

OPTIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "biases and wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf", **OPTIONS[name])
    checkpoint = import_folder(str(hf), str(tmp_path / "ours"))
    assert checkpoint.name == "step_00000000"
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "again"))
    before, after = AutoModelForCausalLM.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(out)
    for (key, one), (other_key, other) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(one, other)
    assert read_architecture(out) == read_architecture(hf)
    assert verify(str(out), str(tmp_path / "ours"), None) <= 1e-4
    assert verify(str(hf), None, None) <= 1e-4


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


def test_bfloat16_export(tmp_path: Path) -> None:
    import_folder(str(save_hf_llama(tmp_path / "hf")), str(tmp_path / "ours"))
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out"), dtype="bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text((hf / "config.json").read_text())
    write_shards(tmp_path / "out", iter(tensors.items()), shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    source = HuggingFaceSource(tmp_path / "out")
    assert source.shapes().keys() == tensors.keys()
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(WeightsError, match="names only tensors that the files hold"):
        HuggingFaceSource(tmp_path / "out")


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


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    with pytest.raises(WeightsError, match="is a folder"):
        open_model(str(tmp_path / "absent"), field="--init-from")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="is a Hugging Face folder"):
        open_model(str(tmp_path / "empty"), field="--init-from")
    for call in (import_folder, lambda a, b: verify(a, b, None)):
        with pytest.raises(WeightsError, match="--hf"):
            call(str(tmp_path / "empty"), str(tmp_path / "x"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(WeightsError, match="--output"):
        import_folder(str(hf), str(tmp_path / "taken"))
    import_folder(str(hf), str(tmp_path / "ours"))
    with pytest.raises(WeightsError, match="--output"):
        export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "taken"))
    with pytest.raises(CheckpointError, match="is a checkpoint of ours"):
        export_checkpoint(str(hf), str(tmp_path / "x"))
    other = save_hf_llama(tmp_path / "other", vocab_size=50)
    with pytest.raises(WeightsError, match="vocabulary of 50 tokens"):
        verify(str(other), str(tmp_path / "ours"), None)
    (tmp_path / "one.txt").write_text("")


def test_weights_that_do_not_fit_their_configuration(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    source = HuggingFaceSource(hf)
    with pytest.raises(WeightsError, match="is among its tensors"):
        source.read("weight", Part(name="nothing", shape=(3,)), 0, 3)
    with pytest.raises(WeightsError, match=r"has shape \(3,\)"):
        source.read("weight", Part(name="model.norm.weight", shape=(3,)), 0, 3)
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is a whole safetensors file"):
        HuggingFaceSource(hf)
    (hf / "model.safetensors").unlink()
    torch.save({}, hf / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickles are not read"):
        HuggingFaceSource(hf)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, object], match: str, tmp_path: Path) -> None:
    raw = {**LlamaConfig(num_attention_heads=4, hidden_size=32, num_key_value_heads=4).to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match=match):
        read_architecture(tmp_path)


def test_unreadable_configurations(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a readable file"):
        read_architecture(tmp_path)
    for text, match in (("{", "is JSON"), ("[]", "is a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=match):
            read_architecture(tmp_path)


def test_a_window_cannot_be_a_llama() -> None:
    arch = Architecture(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2,
                        kv_channels=4, vocab_size=9, sliding_window=4)  # fmt: skip
    with pytest.raises(WeightsError, match="sliding window"):
        hf_config(arch, dtype="float32", bos_id=None, eos_id=None)


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
