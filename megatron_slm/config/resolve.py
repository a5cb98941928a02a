"""Resolves the model's architecture from flags and a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.rules import flag
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, LayoutError

_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "norm_epsilon",
    "rotary_base",
    "rope_scaling",
)
_FIELDS = {name: name for name in _SAME_NAME} | {
    "qkv_bias": "add_qkv_bias",
    "qk_norm": "qk_layernorm",
    "sliding_window": "window_size",
    "initializer_range": "init_method_std",
    "tied": "untie_embeddings_and_output_weights",
}
"""`ModelConfig` field for each `Architecture` field; that of `tied` is negated."""
POSITIONS = ("rotary_base", "local_rotary_base", "rope_scaling", "max_position_embeddings")
"""Fields of the positions' encoding: no weight depends on them."""


def resolve_architecture(
    config: RunConfig, stored: Architecture | None, vocab_size: int, *, starts: bool = False
) -> Architecture:
    """Return the stored architecture (of --init-from or --load) if there is one, else the one of the flags.

    Args:
        vocab_size: size of the run's tokenizer, for an architecture from flags.
        starts: a new model starts from the stored one, and flags may encode its positions in another way.

    Raises:
        ConfigError: a flag contradicts the checkpoint, or a required flag is missing.
    """
    given = _given_fields(config)
    if stored is None:
        return _from_flags(config, given, vocab_size)
    if not starts:
        return _checked(stored, given)
    positions = {name: given.pop(name) for name in POSITIONS if name in given}
    _checked(stored, given)
    if stored.local_rotary_base == stored.rotary_base:  # one base, which only some blocks scale
        positions["local_rotary_base"] = positions.get("rotary_base", stored.rotary_base)
    return _built(lambda: replace(stored, **positions))


def _checked(stored: Architecture, given: dict[str, Any]) -> Architecture:
    for field, value in given.items():
        if getattr(stored, field) != value:
            raise ConfigError(
                _flag(field),
                _as_typed(field, value),
                f"match the checkpoint ({_as_typed(field, getattr(stored, field))!r})",
                "remove the flag; the architecture comes from the checkpoint",
            )
    return stored


def _from_flags(config: RunConfig, given: dict[str, Any], vocab_size: int) -> Architecture:
    for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        if field not in given:
            raise ConfigError.missing(_flag(field), "a model without --init-from", "set it, or use --init-from")
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    if "kv_channels" not in given and hidden % heads:
        raise LayoutError(
            "--hidden-size",
            hidden,
            f"be divisible by --num-attention-heads ({heads})",
            "change one of them, or set --kv-channels",
        )
    defaults = {
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": config.data.seq_length,
    }
    return _built(lambda: Architecture(**{**defaults, **given}))


def _built(build: Callable[[], Architecture]) -> Architecture:
    """Build an architecture; errors name the flags."""
    try:
        return build()
    except LayoutError as error:
        raise LayoutError(_flag(error.field), error.value, error.rule, error.fix) from error


def _given_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of the architecture that flags set."""
    values = {field: getattr(config.model, name) for field, name in _FIELDS.items()}
    given = {field: value for field, value in values.items() if value is not None}
    if "tied" in given:
        given["tied"] = not given["tied"]
    if given.get("rope_scaling") == {"rope_type": "default"}:
        given["rope_scaling"] = {}
    return given


def _as_typed(field: str, value: Any) -> Any:
    return not value if field == "tied" else value


def _flag(field: str) -> str:
    """Return the flag of a field, or of the first part of a dotted one: `--rope-scaling.factor`."""
    name, *inner = field.split(".")
    return ".".join([flag(_FIELDS.get(name, name)), *inner])
