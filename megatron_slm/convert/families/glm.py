"""GLM-4 (dense): norms around attention and MLP, RoPE of interleaved pairs on a part of each head."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family


def _options(config: Any) -> dict[str, Any]:
    return {"norm_placement": "around", "rotary_interleaved": True, "qkv_bias": config.attention_bias}


def _fields(arch: Architecture) -> dict[str, Any]:
    return {
        "attention_bias": arch.qkv_bias,
        "head_dim": arch.kv_channels,
        "partial_rotary_factor": arch.rotary_percent,
        "pad_token_id": None,
    }


GLM4 = Family(
    model_type="glm4",
    name="Glm4",
    models="GLM-4 0414 (dense)",
    options=_options,
    fields=_fields,
    partial_rotary=True,
    stored_modules={
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "post_attention_layernorm": "post_self_attn_layernorm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    },
)
