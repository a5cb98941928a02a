"""The complete architecture of one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_slm.config.rope_scaling import check_rope_scaling
from megatron_slm.errors import LayoutError

_OPTIONAL_NUMBERS = (
    "sliding_window",
    "attention_multiplier",
    "attention_softcap",
    "logit_softcap",
    "local_rotary_base",
)
_LATER = (
    "rotary_percent",
    "rotary_interleaved",
    "local_rotary_base",
    "unrotated_interval",
    "qk_norm_of_all_heads",
    "norm_placement",
    "full_attention_interval",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logit_divisor",
    "attention_softcap",
    "logit_softcap",
    "activation",
    "zero_centered_norms",
)
"""Fields that version 0.2 did not have."""
ACTIVATIONS = ("silu", "gelu-tanh")
NORM_PLACEMENTS = ("before", "after", "around")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama-type decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention) with the options of related families.

    Errors name the fields as here; whoever reads them from flags or files renames them as typed.
    """

    num_layers: int
    """Number of decoder blocks."""
    hidden_size: int
    """Width d of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU's inner layer."""
    num_attention_heads: int
    """Number of query heads."""
    num_query_groups: int
    """Number of key/value heads; each serves heads / groups query heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Number of tokens, without padding."""
    max_position_embeddings: int = 2048
    """Longest supported sequence; written into exported configurations. Some scalings depend on it."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of RoPE."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """RoPE scaling with Hugging Face's field names: empty, or a rope_type of `ROPE_FIELDS` with its fields."""
    rotary_percent: float = 1.0
    """Share of a head's width that RoPE rotates, from its beginning; the rest stays as it is."""
    rotary_interleaved: bool = False
    """RoPE rotates the pairs (2i, 2i + 1) of a head instead of (i, i + half of the rotated width)."""
    local_rotary_base: float | None = None
    """Base of RoPE in blocks with a window, where it is not scaled; None for the same RoPE in all blocks."""
    unrotated_interval: int = 0
    """Every n-th block has no RoPE; 0 for none."""
    tied: bool = False
    """The output weight is the embedding."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before RoPE; one weight for all heads of a block."""
    qk_norm_of_all_heads: bool = False
    """RMSNorm over all query heads together and over all key heads together, before RoPE, in place of `qk_norm`."""
    norm_placement: str = "before"
    """Place of the norms: `before` attention and MLP, `after` them (on what they add to the residual stream), or
    `around` them."""
    sliding_window: int | None = None
    """Number of positions each position attends to, itself included; None for all before it."""
    full_attention_layers: int = 0
    """With a sliding window: number of first blocks with full attention."""
    full_attention_interval: int = 0
    """With a sliding window: every n-th block has full attention too; 0 for none."""
    embedding_multiplier: float = 1.0
    """Factor of the token embeddings."""
    attention_multiplier: float | None = None
    """Factor of the products of queries and keys; None for 1 / sqrt(head width)."""
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logit_divisor: float = 1.0
    """Divides the logits."""
    attention_softcap: float | None = None
    """Soft cap of the products of queries and keys: cap * tanh(product / cap); None for none."""
    logit_softcap: float | None = None
    """Soft cap of the logits; None for none."""
    activation: str = "silu"
    """Activation of the MLP's gate: `silu` or `gelu-tanh`."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        positive = [
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        ]
        positive += ["embedding_multiplier", "residual_multiplier", "logit_divisor"]
        positive += [name for name in _OPTIONAL_NUMBERS if getattr(self, name) is not None]
        for name in positive:
            _require(self, getattr(self, name) > 0, name, "be positive", "use a number above 0")
        _require(
            self,
            self.num_attention_heads % self.num_query_groups == 0,
            "num_attention_heads",
            f"be divisible by the number of query groups ({self.num_query_groups})",
            "choose a number of query groups that divides the number of heads",
        )
        _require(
            self, self.kv_channels % 2 == 0, "kv_channels", "be even (RoPE rotates pairs)", "use an even head width"
        )
        _require(
            self,
            self.rotary_width > 0 and self.rotary_width % 2 == 0,
            "rotary_percent",
            f"be a share of {self.kv_channels} channels that is even (RoPE rotates pairs)",
            "use another share",
        )
        _require(
            self,
            self.norm_placement in NORM_PLACEMENTS,
            "norm_placement",
            f"be one of {', '.join(NORM_PLACEMENTS)}",
            "use one of these",
        )
        _require(
            self,
            self.activation in ACTIVATIONS,
            "activation",
            f"be one of {', '.join(ACTIVATIONS)}",
            "use one of these",
        )
        windowed = self.num_layers if self.sliding_window is not None else 1
        _require(
            self,
            0 <= self.full_attention_layers < windowed,
            "full_attention_layers",
            f"be below {windowed}, the number of blocks" if windowed > 1 else "be 0 without a sliding window",
            "use fewer blocks with full attention, or no sliding window",
        )
        check_rope_scaling(self.rope_scaling, num_pairs=self.rotary_width // 2)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values.

        Fields that version 0.2 did not have are left out where they have their default, so that it reads the
        checkpoints of the models it knows, and the fingerprints of models stay as they were.
        """
        defaults = {f.name: f.default for f in fields(self)}
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in _LATER or value != defaults[name]}

    def window_of(self, block: int) -> int | None:
        """Return the sliding window of one block; None for full attention."""
        interval = self.full_attention_interval
        is_full = block < self.full_attention_layers or (interval > 0 and (block + 1) % interval == 0)
        return None if is_full else self.sliding_window

    def rotates(self, block: int) -> bool:
        """Tell whether a block has RoPE."""
        return not self.unrotated_interval or (block + 1) % self.unrotated_interval != 0

    @property
    def rotary_width(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def query_multiplier(self) -> float:
        """Factor of the queries for kernels that divide products with keys by the square root of a head's width."""
        return 1.0 if self.attention_multiplier is None else self.attention_multiplier * self.kv_channels**0.5

    @property
    def num_parameters(self) -> int:
        """Number of weights, tied weights counted once."""
        d, f = self.hidden_size, self.ffn_hidden_size
        q, kv = self.num_attention_heads * self.kv_channels, self.num_query_groups * self.kv_channels
        norms = 4 if self.norm_placement == "around" else 2
        block = d * (q + 2 * kv) + q * d + 3 * d * f + norms * d
        if self.qkv_bias:
            block += q + 2 * kv
        if self.attention_output_bias:
            block += d
        if self.mlp_bias:
            block += 2 * f + d
        if self.qk_norm:
            block += 2 * self.kv_channels
        if self.qk_norm_of_all_heads:
            block += q + kv
        vocabulary = self.vocab_size * d
        return self.num_layers * block + d + (vocabulary if self.tied else 2 * vocabulary)


def _require(architecture: Architecture, condition: bool, name: str, rule: str, fix: str) -> None:
    if not condition:
        raise LayoutError(name, getattr(architecture, name), rule, fix)
