"""The model's architecture as the flags and a checkpoint describe it."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, LayoutError


def resolve_architecture(config: RunConfig, stored: Architecture | None, vocab_size: int) -> Architecture:
    """The model's architecture: the stored one (of --init-from or --load) if there is one, else from the flags.

    Args:
        vocab_size: tokens of the run's tokenizer; for a model that is described by flags.

    Raises:
        ConfigError: a flag contradicts the checkpoint, or a needed flag is missing.
    """
    model, given = config.model, _given_fields(config)
    if stored is not None:
        for name, value in given.items():
            if getattr(stored, name) != value:
                raise ConfigError(
                    _FLAGS[name],
                    value,
                    f"agrees with the checkpoint, which says {getattr(stored, name)!r}",
                    "leave the flag out; the architecture comes from the checkpoint",
                )
        architecture = stored
    else:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            if name not in given:
                raise ConfigError(_FLAGS[name], None, "is given, or --init-from is", "describe the model")
        heads, hidden = model.num_attention_heads or 0, model.hidden_size or 0
        if "kv_channels" not in given and hidden % heads:
            raise LayoutError(
                "--hidden-size",
                hidden,
                f"is divisible by --num-attention-heads ({heads})",
                "change one of them, or give --kv-channels",
            )
        defaults = {
            "num_query_groups": heads,
            "kv_channels": hidden // heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": config.data.seq_length,
        }
        architecture = Architecture(**{**defaults, **given})
    return architecture


_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "max_position_embeddings": "--max-position-embeddings",
    "norm_epsilon": "--norm-epsilon",
    "rotary_base": "--rotary-base",
    "rope_scaling": "--rope-scaling",
    "qkv_bias": "--add-qkv-bias",
    "qk_norm": "--qk-layernorm",
    "sliding_window": "--window-size",
    "initializer_range": "--init-method-std",
    "tied": "--untie-embeddings-and-output-weights",
}
"""The flag that sets each field of an architecture."""


def _given_fields(config: RunConfig) -> dict[str, Any]:
    model = config.model
    named = {field: getattr(model, flag[2:].replace("-", "_")) for field, flag in _FLAGS.items()}
    if model.untie_embeddings_and_output_weights is not None:
        named["tied"] = not model.untie_embeddings_and_output_weights
    return {field: value for field, value in named.items() if value is not None}
