"""Configuration of the model's architecture and initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_slm.config.rules import require_positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and initial weights. With --init-from, the architecture comes from there and flags must match it;
    --rotary-base, --rope-scaling and --max-position-embeddings may differ, for a longer context."""

    num_layers: int | None = None
    """Number of decoder blocks."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). Default: the number of query heads."""
    kv_channels: int | None = None
    """Width of a head. Default: hidden size / number of query heads."""
    max_position_embeddings: int | None = None
    """Longest sequence, recorded in the exported model's configuration. Default: --init-from's, or --seq-length."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm. Default: 1e-5."""
    rotary_base: float | None = None
    """Base (theta) of the rotary position embedding. Default: --init-from's, or 10000."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling as JSON with the fields of a Hugging Face config; rope_type linear, dynamic, llama3, yarn or
    longrope, or default for none. Default: --init-from's, or none."""
    untie_embeddings_and_output_weights: bool | None = None
    """Use separate weights for the embedding and the output layer. Default: separate."""
    add_qkv_bias: bool | None = None
    """Add biases to the query, key and value projections (Qwen2)."""
    qk_layernorm: bool | None = None
    """Apply RMSNorm to each query and key head (Qwen3)."""
    window_size: int | None = None
    """Sliding attention window in tokens, including the current one. Default: full attention."""
    init_method_std: float | None = None
    """Standard deviation of the initial weights. Default: 0.02."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this, independent of the layout. Padding is never saved."""
    init_from: str | None = None
    """Initial weights: a Hugging Face folder, a name of the Hugging Face hub (org/name, org/name@revision), or a
    checkpoint of this package saved at any layout. Default: random weights."""

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
