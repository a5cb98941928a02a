"""Shapes of well-known models by name, for plans without their files; from their config.json on the hub."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture


def _shape(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, positions: int, **others: Any
) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocab,
        max_position_embeddings=positions,
        **{"kv_channels": hidden // heads, **others},
    )


_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0078125,
    "residual_multiplier": 0.22,
    "logit_divisor": 16.0,
}
_GEMMA: dict[str, Any] = {
    "kv_channels": 256,
    "tied": True,
    "norm_placement": "around",
    "zero_centered_norms": True,
    "activation": "gelu-tanh",
}

KNOWN_MODELS = {
    "smollm2-135m": _shape(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": _shape(32, 960, 2560, 15, 5, 49152, 8192, tied=True),
    "tinyllama-1.1b": _shape(22, 2048, 5632, 32, 4, 32000, 2048),
    "llama-2-7b": _shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": _shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": _shape(80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, 128256, 131072, tied=True),
    "llama-3.1-8b": _shape(32, 4096, 14336, 32, 8, 128256, 131072),
    "llama-3.1-70b": _shape(80, 8192, 28672, 64, 8, 128256, 131072),
    "mistral-7b-v0.1": _shape(32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096),
    "qwen2.5-1.5b": _shape(28, 1536, 8960, 12, 2, 151936, 131072, tied=True, qkv_bias=True),
    "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4, 152064, 131072, qkv_bias=True),
    "smollm3-3b": _shape(36, 2048, 11008, 16, 4, 128256, 65536, tied=True, unrotated_interval=4),
    "phi-4-mini": _shape(32, 3072, 8192, 24, 8, 200064, 131072, tied=True, rotary_percent=0.75),
    "phi-4": _shape(40, 5120, 17920, 40, 10, 100352, 16384),
    "ministral-8b-2410": _shape(36, 4096, 12288, 32, 8, 131072, 32768, sliding_window=32768),
    "granite-3.1-8b": _shape(40, 4096, 12800, 32, 8, 49155, 131072, tied=True, **_GRANITE),
    "glm-4-9b-0414": _shape(40, 4096, 13696, 32, 2, 151552, 32768, norm_placement="around", qkv_bias=True),
    "olmo-2-7b": _shape(32, 4096, 11008, 32, 32, 100352, 4096, norm_placement="after", qk_norm_of_all_heads=True),
    "olmo-3-7b": _shape(
        32,
        4096,
        11008,
        32,
        32,
        100278,
        65536,
        norm_placement="after",
        qk_norm_of_all_heads=True,
        sliding_window=4096,
        full_attention_interval=4,
    ),
    "gemma-2-9b": _shape(
        42, 3584, 14336, 16, 8, 256000, 8192, sliding_window=4096, full_attention_interval=2, **_GEMMA
    ),
    "gemma-3-1b": _shape(
        26, 1152, 6912, 4, 1, 262144, 32768, sliding_window=512, full_attention_interval=6, qk_norm=True, **_GEMMA
    ),
}
"""Architectures by name in lower case."""
