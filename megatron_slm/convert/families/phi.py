"""Phi-3 and Phi-4: fused projections, RoPE on a part of each head, longrope."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family, default_width


def _options(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _fields(arch: Architecture) -> dict[str, Any]:
    old_length = arch.rope_scaling.get("original_max_position_embeddings", arch.max_position_embeddings)
    return {
        "sliding_window": arch.sliding_window,
        "original_max_position_embeddings": old_length,
        "partial_rotary_factor": arch.rotary_percent,
        "pad_token_id": None,
        **({} if default_width(arch) else {"head_dim": arch.kv_channels}),
    }


PHI3 = Family(
    model_type="phi3",
    name="Phi3",
    models="Phi-3, Phi-3.5 and Phi-4 (text)",
    options=_options,
    fields=_fields,
    partial_rotary=True,
    stored_modules={
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    },
)
