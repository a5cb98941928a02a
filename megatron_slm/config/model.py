"""The model's architecture and initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_slm.config.rules import require_positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Left out, it comes from --init-from; given as well, the two must agree."""

    num_layers: int | None = None
    """Number of decoder blocks."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of a head; default: hidden size / heads."""
    max_position_embeddings: int | None = None
    """Longest sequence the exported model claims to read; default: --seq-length."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm; default 1e-5."""
    rotary_base: float | None = None
    """Theta of the rotary position embedding; default 10000."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling as in a Hugging Face config (rope_type linear or llama3)."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output layer has a weight of its own (default) instead of the embedding's."""
    add_qkv_bias: bool | None = None
    """Biases on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool | None = None
    """RMSNorm over each query and key head (Qwen3)."""
    window_size: int | None = None
    """Sliding-window attention: positions seen, the own one included."""
    init_method_std: float | None = None
    """Standard deviation of initial weights; default 0.02."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, at any layout alike; padding is never stored."""
    init_from: str | None = None
    """Start from these weights: a Hugging Face folder, or one of our checkpoints written at any layout."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "window_size",
            "make_vocab_size_divisible_by",
            "norm_epsilon",
            "rotary_base",
            "init_method_std",
        )
