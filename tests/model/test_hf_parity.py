"""Same weights as transformers, same logits and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.hf_config import read_architecture
from megatron_slm.loss import token_statistics
from tests.support.models import dense_stage, logits_bsV, random_hf_model

BASE = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMAS = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one group": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head width of its own": {"head_dim": 12, "num_key_value_heads": 3},
    "rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}},
    "rope llama3": {"rope_parameters": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "epsilon": {"rms_norm_eps": 1e-2},
}


def compare(arch: Architecture, model: torch.nn.Module, length: int = 40) -> None:
    tokens_bs = torch.randint(arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    stage = dense_stage(arch, dict(model.state_dict()))
    with torch.no_grad():
        theirs = model(tokens_bs).logits
        ours = logits_bsV(stage, tokens_bs)
        assert (ours - theirs).abs().max() <= 1e-5
        labels_N = tokens_bs.roll(-1, 1).flatten()
        hidden_Nd = stage(tokens_bs).transpose(0, 1).flatten(0, 1)
        losses = token_statistics(
            hidden_Nd, stage.output_weight().weight_Vd, labels_N, torch.ones_like(labels_N) > 0
        ).loss_N
        expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels_N, reduction="none")
        assert (losses - expected).abs().max() <= 1e-5
        assert expected.std() > 0.5  # a model whose losses all look alike would prove nothing


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name: str, tmp_path) -> None:
    model = random_hf_model("Llama", 1, **{**BASE, **LLAMAS[name]})
    model.save_pretrained(tmp_path)
    compare(read_architecture(tmp_path), model)


def test_sliding_window_is_mistrals(tmp_path) -> None:
    random_hf_model("Llama", 1, **BASE).save_pretrained(tmp_path)
    arch = replace(read_architecture(tmp_path), sliding_window=7)
    compare(arch, random_hf_model("Mistral", 2, **BASE, sliding_window=7, head_dim=8))


def test_qkv_bias_is_qwen2s(tmp_path) -> None:
    random_hf_model("Llama", 1, **BASE, rms_norm_eps=1e-6).save_pretrained(tmp_path)
    arch = replace(read_architecture(tmp_path), qkv_bias=True)
    compare(arch, random_hf_model("Qwen2", 2, **BASE))


def test_a_different_window_gives_other_logits(tmp_path) -> None:
    random_hf_model("Llama", 1, **BASE).save_pretrained(tmp_path)
    arch = replace(read_architecture(tmp_path), sliding_window=8)
    with pytest.raises(AssertionError):
        compare(arch, random_hf_model("Mistral", 2, **BASE, sliding_window=7, head_dim=8))


def test_bf16_is_close_to_fp32(tmp_path) -> None:
    model = random_hf_model("Llama", 1, **BASE)
    model.save_pretrained(tmp_path)
    stage = dense_stage(read_architecture(tmp_path), dict(model.state_dict()))
    tokens_bs = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(3))
    exact = logits_bsV(stage, tokens_bs)
    rounded = logits_bsV(stage.to(torch.bfloat16), tokens_bs)
    with torch.no_grad():
        theirs = model.to(torch.bfloat16)(tokens_bs).logits
    assert (rounded - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.05
