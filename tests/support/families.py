"""Small random models of every family, as transformers saves them, whose every option tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.checkpoint.load import CheckpointSource
from tests.support.models import dense_stage, logits_bsV, random_hf_model

BASE = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 3]}),
    "tinyllama": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5 with a window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-5},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 with everything": (
        "Qwen3", {"head_dim": 10, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
                  "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "ministral": (
        "Ministral", {"sliding_window": 5, "layer_types": ["full_attention"] + 2 * ["sliding_attention"],
                      "tie_word_embeddings": True, "head_dim": 8},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "attention_bias": True, "tie_word_embeddings": True}),
    "granite 3": (
        "Granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.6,
                    "logits_scaling": 0.75, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "phi-3": (
        "Phi3", {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0,
                                                         "partial_rotary_factor": 0.67}},
    ),
    "phi-4-mini with longrope": (
        "Phi3", {"hidden_size": 32, "original_max_position_embeddings": 16, "tie_word_embeddings": True,
                 "rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
                                     "long_factor": [1.5, 3.0], "short_factor": [1.0, 1.2]}},
    ),
    "glm-4": ("Glm4", {"head_dim": 12, "attention_bias": True}),
    "olmo 2": ("Olmo2", {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
    "olmo 3": (
        "Olmo3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                  "rope_parameters": {
                      "full_attention": {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0,
                                         "original_max_position_embeddings": 16},
                      "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}},
    ),
    "gemma 2": (
        "Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5, "attn_logit_softcapping": 0.8,
                   "final_logit_softcapping": 1.5, "attention_bias": True},
    ),
    "gemma 3": (
        "Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "num_hidden_layers": 4,
                   "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
                   "rope_parameters": {
                       "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0},
                       "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    ),
}  # fmt: skip
"""transformers' class, and options that make a difference in a small model."""


def family_model(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """A random model of a family."""
    kind, its_options = FAMILIES[name]
    return random_hf_model(kind, seed, **{**BASE, **its_options, **options})


def save_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model of a family on disk."""
    family_model(name, **options).to(dtype).save_pretrained(folder, max_shard_size=options.get("shard", "5GB"))
    return folder


TOKENS_BS = torch.randint(BASE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))
"""Longer than every window and every first length of a scaling."""


def logits_of(folder: Path) -> Tensor:
    """Logits of `TOKENS_BS` that transformers computes from a folder."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS_BS).logits


def our_logits(checkpoint: Path) -> Tensor:
    """Logits of `TOKENS_BS` that our decoder computes from a checkpoint."""
    source = CheckpointSource(checkpoint)
    state = {name: source.whole(name) for name in source.shapes()}
    with torch.no_grad():
        return logits_bsV(dense_stage(Manifest.read(checkpoint).architecture, state), TOKENS_BS)
