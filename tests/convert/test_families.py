"""Every family, in and out: weights bit for bit, configurations equal, the same logits; planted faults are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.families import family_of
from megatron_slm.convert.hf_config import exported_config, read_architecture
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.verify import verify
from megatron_slm.errors import WeightsError
from megatron_slm.planning.parameters import stage_parameters
from tests.support.families import BASE, FAMILIES, TOKENS_BS, family_model, logits_of, our_logits, save_family
from tests.support.models import dense_stage, logits_bsV, random_hf_model


@pytest.mark.parametrize("name", FAMILIES)
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    hf = save_family(name, tmp_path / "hf")
    theirs = logits_of(hf)
    assert theirs.std() > 0.5  # logits that all look alike would prove nothing
    checkpoint = import_folder(str(hf), str(tmp_path / "ours"))
    assert (our_logits(checkpoint) - theirs).abs().max() <= 1e-5
    done = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "again"))
    assert done.report is not None
    assert done.report.max_nats <= 1e-5
    before, after = load_file(hf / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((done.folder / file).read_text()) == json.loads((hf / file).read_text())
    assert torch.equal(logits_of(done.folder), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trained_from_scratch(name: str, tmp_path: Path) -> None:
    """The family and its configuration are made from the architecture alone."""
    model = family_model(name)
    model.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    raw = exported_config(arch, None, dtype="float32", special_ids=ids, is_trained=True)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_architecture(tmp_path) == arch
    size = sum(parameter.numel() for parameter in model.parameters())
    [stage] = stage_parameters(arch, tensor=1, num_stages=1, vocabulary_divisible_by=1)
    assert arch.num_parameters == stage.total == size
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path), model(TOKENS_BS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = save_family("qwen3", tmp_path / "hf", dtype=dtype)
    checkpoint = import_folder(str(hf), str(tmp_path / "ours"))
    assert set(CheckpointSource(checkpoint).dtypes().values()) == {dtype}
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "again")).folder
    before, after = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    wide = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "wide"), dtype="float32").folder
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}
    assert AutoConfig.from_pretrained(wide).dtype == torch.float32


def test_no_family_for_some_architectures() -> None:
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2,
             "kv_channels": 4, "vocab_size": 9}  # fmt: skip
    assert family_of(Architecture(**shape)).model_type == "llama"
    assert family_of(Architecture(**shape, sliding_window=4)).model_type == "mistral"
    assert family_of(Architecture(**shape, qkv_bias=True)).model_type == "qwen2"
    assert family_of(Architecture(**shape, qk_norm=True, sliding_window=3)).model_type == "qwen3"
    assert family_of(Architecture(**{**shape, "num_attention_heads": 3, "num_query_groups": 3})).model_type == "mistral"
    with pytest.raises(WeightsError, match=r"model architecture is .*qk_norm.*: must match a family in transformers"):
        family_of(Architecture(**shape, qk_norm=True, mlp_bias=True))
    with pytest.raises(WeightsError, match="attention_output_bias"):
        family_of(Architecture(**shape, attention_output_bias=True))


def swapped_heads(state: dict[str, torch.Tensor]) -> None:
    weight = state["model.layers.1.self_attn.q_proj.weight"]
    width = len(weight) // 4
    state["model.layers.1.self_attn.q_proj.weight"] = torch.cat(
        [weight[width : 2 * width], weight[:width], weight[2 * width :]]
    )


def rows_of_a_head_in_megatrons_order(state: dict[str, torch.Tensor]) -> None:
    """RoPE turns (i, i + k / 2) in one convention and (2i, 2i + 1) in the other."""
    name = "model.layers.0.self_attn.k_proj.weight"
    heads = state[name].unflatten(0, (2, -1))
    state[name] = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


def missing_transpose(state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"  # square, so that its shape does not tell
    state[name] = state[name].t().contiguous()


def gate_for_up(state: dict[str, torch.Tensor]) -> None:
    gate, up = (f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
    state[gate], state[up] = state[up], state[gate]


def norms_exchanged(state: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.1.self_attn.{name}.weight" for name in ("q_norm", "k_norm"))
    state[one], state[other] = state[other], state[one]


def block_shifted(state: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))
    state[one], state[other] = state[other], state[one]


FAULTS = [
    swapped_heads,
    rows_of_a_head_in_megatrons_order,
    missing_transpose,
    gate_for_up,
    norms_exchanged,
    block_shifted,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_verify_sees_weights_that_are_out_of_place(fault: Any, tmp_path: Path) -> None:
    hf = save_family("qwen3", tmp_path / "hf", hidden_size=32)
    import_folder(str(hf), str(tmp_path / "ours"))
    assert verify(str(hf), str(tmp_path / "ours"), num_tokens=64).max_nats <= 1e-5
    state = load_file(hf / "model.safetensors")
    fault(state)
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    assert verify(str(hf), str(tmp_path / "ours"), num_tokens=64).max_nats > 1e-2
    with pytest.raises(AssertionError):
        assert (our_logits(tmp_path / "ours" / "step_00000000") - logits_of(hf)).abs().max() <= 1e-5


def test_an_untied_head_is_refused_where_the_configuration_says_tied(tmp_path: Path) -> None:
    hf = save_family("smollm2", tmp_path / "hf")
    state = load_file(hf / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    import_folder(str(hf), str(tmp_path / "copied"))  # a second copy of the same is what some folders have
    state["lm_head.weight"][3, 4] += 0.01
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lm_head.weight in .*model.safetensors is .*: must equal the embedding"):
        import_folder(str(hf), str(tmp_path / "ours"))
    raw = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    import_folder(str(hf), str(tmp_path / "untied"))
    assert verify(str(hf), str(tmp_path / "untied"), num_tokens=64).max_nats <= 1e-5


def test_a_window_that_is_one_short(tmp_path: Path) -> None:
    """Positions before the window's length do not tell, and the report says where it begins."""
    hf = save_family("mistral", tmp_path / "hf")
    import_folder(str(hf), str(tmp_path / "ours"))
    raw = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**raw, "sliding_window": 8}))
    with pytest.raises(WeightsError, match="--load: sliding_window is 7: must equal 8"):
        verify(str(hf), str(tmp_path / "ours"))
    model = random_hf_model("Mistral", 0, **{**BASE, "sliding_window": 8, "head_dim": 8})
    stage = dense_stage(read_architecture(hf), dict(model.state_dict()))
    stage.layers[1].self_attn.window = 7
    with torch.no_grad():
        apart = (logits_bsV(stage, TOKENS_BS) - model(TOKENS_BS).logits).abs().amax((0, 2))
    assert apart[:7].max() <= 1e-5
    assert apart[7:].max() > 1e-3
