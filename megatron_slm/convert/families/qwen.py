"""Qwen2 and Qwen3: biases, norms of query and key heads, windows from a block on."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family, default_width
from megatron_slm.convert.families.windows import layer_types, window_options


def _window_fields(arch: Architecture) -> dict[str, Any]:
    """Return the window of the last blocks; transformers derives each block's kind from max_window_layers."""
    windowed = arch.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": arch.sliding_window,
        "max_window_layers": arch.full_attention_layers if windowed else arch.num_layers,
        "layer_types": layer_types(arch) if arch.full_attention_interval else None,
    }


def _qwen2_options(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, **window_options(config)}


def _qwen2_fields(arch: Architecture) -> dict[str, Any]:
    head_dim = (
        {} if default_width(arch) else {"head_dim": arch.kv_channels}
    )  # no declared field, but the model reads it
    return _window_fields(arch) | head_dim


def _qwen3_options(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"qk_norm": True, "qkv_bias": bias, "attention_output_bias": bias, **window_options(config)}


def _qwen3_fields(arch: Architecture) -> dict[str, Any]:
    return _window_fields(arch) | {"attention_bias": arch.qkv_bias, "head_dim": arch.kv_channels}


QWEN2 = Family(
    model_type="qwen2",
    name="Qwen2",
    models="Qwen2, Qwen2.5",
    options=_qwen2_options,
    fields=_qwen2_fields,
    reads_layer_types=True,
)
QWEN3 = Family(
    model_type="qwen3",
    name="Qwen3",
    models="Qwen3 (dense)",
    options=_qwen3_options,
    fields=_qwen3_fields,
    reads_layer_types=True,
)
