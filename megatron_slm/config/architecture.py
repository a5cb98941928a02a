"""The shape of one model, complete: every number that its mathematics needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_slm.errors import LayoutError

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The scalings of RoPE that are known, and the numbers each needs."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama-type decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention), with the options its kin need."""

    num_layers: int
    """Number of decoder blocks."""
    hidden_size: int
    """Width d of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU's inner layer."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads; each serves heads / groups query heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """True number of tokens, without padding."""
    max_position_embeddings: int = 2048
    """Longest sequence the model was made for; written into exported configurations."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rotary_base: float = 10000.0
    """RoPE's theta."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """RoPE scaling by Hugging Face's names: empty, or rope_type `linear` or `llama3` and its numbers."""
    tied: bool = False
    """The output weight is the embedding."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm over the width of each query and key head, before RoPE; one weight for all heads of a block."""
    sliding_window: int | None = None
    """Each position sees this many positions, itself included; None for all before it."""
    full_attention_layers: int = 0
    """With a sliding window: the first blocks that see everything all the same."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        positive = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise LayoutError(name, getattr(self, name), "is at least 1", "give a positive number")
        if self.num_attention_heads % self.num_query_groups:
            raise LayoutError(
                "num_attention_heads",
                self.num_attention_heads,
                f"is divisible by num_query_groups ({self.num_query_groups})",
                "choose a number of query groups that divides the heads",
            )
        if self.kv_channels % 2:
            raise LayoutError("kv_channels", self.kv_channels, "is even (RoPE turns pairs)", "use an even head width")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise LayoutError("sliding_window", self.sliding_window, "is at least 1, or None", "give a positive number")
        windowed = self.num_layers if self.sliding_window is not None else 1
        if not 0 <= self.full_attention_layers < windowed:
            raise LayoutError(
                "full_attention_layers",
                self.full_attention_layers,
                "leaves at least one block to the sliding window, and is 0 without one",
                "give fewer, or no sliding window",
            )
        self._check_rope()

    def _check_rope(self) -> None:
        rope_type = self.rope_scaling.get("rope_type", "default")
        if rope_type not in ROPE_FIELDS:
            raise LayoutError(
                "rope_scaling.rope_type",
                rope_type,
                f"is one of {', '.join(ROPE_FIELDS)}",
                "use a checkpoint with one of these",
            )
        unknown = sorted(set(self.rope_scaling) - {"rope_type", *ROPE_FIELDS[rope_type]})
        if unknown:
            raise LayoutError(
                f"rope_scaling.{unknown[0]}",
                self.rope_scaling[unknown[0]],
                f"is a field of rope_type {rope_type} (which has {', '.join(ROPE_FIELDS[rope_type]) or 'none'})",
                "leave it out, or use a checkpoint without it",
            )
        for name in ROPE_FIELDS[rope_type]:
            value = self.rope_scaling.get(name)
            if not isinstance(value, int | float) or value <= 0:
                raise LayoutError(
                    f"rope_scaling.{name}", value, f"is a positive number with rope_type {rope_type}", "give it"
                )

    def window_of(self, block: int) -> int | None:
        """The sliding window of one block; None where it sees everything before it."""
        return None if block < self.full_attention_layers else self.sliding_window

    @property
    def num_parameters(self) -> int:
        """Weights of the model, the tied output counted once."""
        d, f = self.hidden_size, self.ffn_hidden_size
        q, kv = self.num_attention_heads * self.kv_channels, self.num_query_groups * self.kv_channels
        block = d * (q + 2 * kv) + q * d + 3 * d * f + 2 * d
        block += (q + 2 * kv) * self.qkv_bias + d * self.attention_output_bias + (2 * f + d) * self.mlp_bias
        block += 2 * self.kv_channels * self.qk_norm
        return self.num_layers * block + d + self.vocab_size * d * (1 if self.tied else 2)
