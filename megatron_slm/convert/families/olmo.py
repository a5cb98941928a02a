"""OLMo 2 and 3: norms after attention and MLP, and over all query and key heads together."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family, default_width
from megatron_slm.convert.families.windows import layer_types, window_options


def _olmo2_options(config: Any) -> dict[str, Any]:
    return {
        "norm_placement": "after",
        "qk_norm_of_all_heads": True,
        "qkv_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
    }


def _olmo2_fields(arch: Architecture) -> dict[str, Any]:
    head_dim = {} if default_width(arch) else {"head_dim": arch.kv_channels}
    return {"attention_bias": arch.qkv_bias, "pad_token_id": None, **head_dim}


def _olmo3_options(config: Any) -> dict[str, Any]:
    return _olmo2_options(config) | window_options(config)


def _olmo3_fields(arch: Architecture) -> dict[str, Any]:
    return _olmo2_fields(arch) | {"sliding_window": arch.sliding_window, "layer_types": layer_types(arch)}


OLMO2 = Family(
    model_type="olmo2",
    name="Olmo2",
    models="OLMo 2",
    options=_olmo2_options,
    fields=_olmo2_fields,
)
OLMO3 = Family(
    model_type="olmo3",
    name="Olmo3",
    models="OLMo 3",
    options=_olmo3_options,
    fields=_olmo3_fields,
    reads_layer_types=True,
    rope_by_kind=True,
)
