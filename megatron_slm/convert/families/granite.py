"""Granite 3: multipliers of embeddings, attention, residual connections and logits."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family, default_width


def _options(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": float(config.embedding_multiplier),
        "attention_multiplier": float(config.attention_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "logit_divisor": float(config.logits_scaling),
    }


def _fields(arch: Architecture) -> dict[str, Any]:
    scale = arch.kv_channels**-0.5 if arch.attention_multiplier is None else arch.attention_multiplier
    return {
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.mlp_bias,
        "embedding_multiplier": arch.embedding_multiplier,
        "attention_multiplier": scale,
        "residual_multiplier": arch.residual_multiplier,
        "logits_scaling": arch.logit_divisor,
        **({} if default_width(arch) else {"head_dim": arch.kv_channels}),
    }


GRANITE = Family(
    model_type="granite",
    name="Granite",
    models="Granite 3 (dense)",
    options=_options,
    fields=_fields,
)
