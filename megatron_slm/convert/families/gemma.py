"""Gemma 2 and 3 (text): norms around attention and MLP, soft caps, scaled embeddings, alternating windows."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.families.windows import layer_types, unsupported, window_options

_ACTIVATION = "gelu_pytorch_tanh"


def _options(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise unsupported(config, "use_bidirectional_attention", "be false: positions attend to those before them")
    own_scale = config.query_pre_attn_scalar != config.head_dim
    return {
        "norm_placement": "around",
        "zero_centered_norms": True,
        "activation": "gelu-tanh",
        "embedding_multiplier": config.hidden_size**0.5,
        "attention_multiplier": config.query_pre_attn_scalar**-0.5 if own_scale else None,
        "qkv_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "logit_softcap": config.final_logit_softcapping,
        **window_options(config),
    }


def _fields(arch: Architecture) -> dict[str, Any]:
    scale = arch.attention_multiplier
    return {
        "hidden_activation": _ACTIVATION,
        "head_dim": arch.kv_channels,
        "query_pre_attn_scalar": arch.kv_channels if scale is None else round(scale**-2),
        "attention_bias": arch.qkv_bias,
        "final_logit_softcapping": arch.logit_softcap,
        "sliding_window": arch.sliding_window,
        "layer_types": layer_types(arch),
        "pad_token_id": None,
    }


def _gemma2_options(config: Any) -> dict[str, Any]:
    return {**_options(config), "attention_softcap": config.attn_logit_softcapping}


def _gemma2_fields(arch: Architecture) -> dict[str, Any]:
    return {**_fields(arch), "attn_logit_softcapping": arch.attention_softcap}


def _gemma3_options(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping is not None:
        raise unsupported(config, "attn_logit_softcapping", "be absent: transformers caps no products of this family")
    return {**_options(config), "qk_norm": True}


GEMMA2 = Family(
    model_type="gemma2",
    name="Gemma2",
    models="Gemma 2",
    options=_gemma2_options,
    fields=_gemma2_fields,
    activation_field="hidden_activation",
    activations=(_ACTIVATION,),
    reads_layer_types=True,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    name="Gemma3",
    config_name="Gemma3TextConfig",
    models="Gemma 3 (text: 270M and 1B, and the text part of others)",
    options=_gemma3_options,
    fields=_fields,
    activation_field="hidden_activation",
    activations=(_ACTIVATION,),
    reads_layer_types=True,
    rope_by_kind=True,
)
