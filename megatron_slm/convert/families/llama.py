"""Llama, and families that differ from it by an option: Mistral, Ministral, SmolLM3."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family, default_width
from megatron_slm.convert.families.windows import FULL, layer_types, unsupported, window_options


def _llama_options(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _llama_fields(arch: Architecture) -> dict[str, Any]:
    return {"attention_bias": arch.qkv_bias, "mlp_bias": arch.mlp_bias, "head_dim": arch.kv_channels}


def _mistral_options(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _mistral_fields(arch: Architecture) -> dict[str, Any]:
    return {"sliding_window": arch.sliding_window, "head_dim": arch.kv_channels}


def _ministral_fields(arch: Architecture) -> dict[str, Any]:
    return _mistral_fields(arch) | {"layer_types": layer_types(arch)}


def _smollm3_options(config: Any) -> dict[str, Any]:
    rotates = [bool(rotates) for rotates in config.no_rope_layers]
    interval = 0 if all(rotates) else rotates.index(False) + 1
    if rotates != [not interval or (index + 1) % interval != 0 for index in range(config.num_hidden_layers)]:
        raise unsupported(config, "no_rope_layers", "have a 0 at every n-th position, or at none")
    if set(config.layer_types) != {FULL}:
        raise unsupported(config, "layer_types", "be full_attention throughout")
    return {**_llama_options(config), "unrotated_interval": interval}


def _smollm3_fields(arch: Architecture) -> dict[str, Any]:
    return {
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.mlp_bias,
        "no_rope_layers": [int(arch.rotates(index)) for index in range(arch.num_layers)],
        "pad_token_id": None,  # the default is no token of a small vocabulary
        "no_rope_layer_interval": arch.unrotated_interval or arch.num_layers + 1,
        **({} if default_width(arch) else {"head_dim": arch.kv_channels}),
    }


LLAMA = Family(
    model_type="llama",
    name="Llama",
    models="Llama 2 and 3, TinyLlama, SmolLM2",
    options=_llama_options,
    fields=_llama_fields,
)
MISTRAL = Family(
    model_type="mistral",
    name="Mistral",
    models="Mistral 7B",
    options=_mistral_options,
    fields=_mistral_fields,
)
MINISTRAL = Family(
    model_type="ministral",
    name="Ministral",
    models="Ministral 8B",
    options=window_options,
    fields=_ministral_fields,
    reads_layer_types=True,
)
SMOLLM3 = Family(
    model_type="smollm3",
    name="SmolLM3",
    models="SmolLM3",
    options=_smollm3_options,
    fields=_smollm3_fields,
    reads_layer_types=True,
)
