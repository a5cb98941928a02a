"""Supported families of Hugging Face models: their transformers classes and the options that differ.

A family converts a transformers configuration to an `Architecture` and back. All families name their weights
alike; checkpoints use these names as logical names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import SlmError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models in transformers."""

    model_type: str
    """`model_type` in config.json."""
    name: str
    """Class-name prefix in transformers, e.g. `Llama`."""
    models: str
    """Released models of the family."""
    options: Callable[[Any], dict[str, Any]]
    """Converts a configuration to the fields of an `Architecture` that not all families have."""
    fields: Callable[[Architecture], dict[str, Any]]
    """Inverse of `options`."""

    @property
    def causal_lm(self) -> str:
        """Name of the causal language model class."""
        return f"{self.name}ForCausalLM"

    def config_class(self) -> Any:
        """Return the configuration class in transformers."""
        import transformers

        return getattr(transformers, f"{self.name}Config")

    def config(self, arch: Architecture, **others: Any) -> Any:
        """Build a configuration of this family; options of `arch` that the family lacks are lost (see `family_of`)."""
        rope = {"rope_type": "default", **arch.rope_scaling, "rope_theta": arch.rotary_base}
        return self.config_class()(
            architectures=[self.causal_lm],
            num_hidden_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_hidden_size,
            num_attention_heads=arch.num_attention_heads,
            num_key_value_heads=arch.num_query_groups,
            vocab_size=arch.vocab_size,
            max_position_embeddings=arch.max_position_embeddings,
            rms_norm_eps=arch.norm_epsilon,
            rope_parameters=rope,
            tie_word_embeddings=arch.tied,
            initializer_range=arch.initializer_range,
            **self.fields(arch),
            **others,
        )

    def architecture(self, config: Any) -> Architecture:
        """Return the architecture of a configuration of this family, whose rope_type must be supported.

        Raises:
            LayoutError: the sizes contradict each other.
        """
        rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}  # old name of rope_type
        base = float(rope.pop("rope_theta"))
        if rope.get("rope_type", "default") == "default":
            rope.pop("rope_type", None)
        return Architecture(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            kv_channels=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            norm_epsilon=config.rms_norm_eps,
            rotary_base=base,
            rope_scaling=rope,
            tied=config.tie_word_embeddings,
            initializer_range=config.initializer_range,
            **self.options(config),
        )


def _llama_options(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _llama_fields(arch: Architecture) -> dict[str, Any]:
    return {"attention_bias": arch.qkv_bias, "mlp_bias": arch.mlp_bias, "head_dim": arch.kv_channels}


def _mistral_options(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _mistral_fields(arch: Architecture) -> dict[str, Any]:
    return {"sliding_window": arch.sliding_window, "head_dim": arch.kv_channels}


def _qwen_window(config: Any) -> dict[str, Any]:
    """Return the sliding window of the last blocks; transformers derives each block's kind from max_window_layers."""
    num_full = sum(kind == "full_attention" for kind in config.layer_types)
    if num_full == config.num_hidden_layers:
        return {}
    return {"sliding_window": config.sliding_window, "full_attention_layers": num_full}


def _qwen_window_fields(arch: Architecture) -> dict[str, Any]:
    windowed = arch.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": arch.sliding_window,
        "max_window_layers": arch.full_attention_layers if windowed else arch.num_layers,
    }


def _qwen2_options(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_window(config)}


def _qwen2_fields(arch: Architecture) -> dict[str, Any]:
    default_heads = arch.kv_channels * arch.num_attention_heads == arch.hidden_size
    head_dim = {} if default_heads else {"head_dim": arch.kv_channels}  # not a declared field, but the model reads it
    return _qwen_window_fields(arch) | head_dim


def _qwen3_options(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"qk_norm": True, "qkv_bias": bias, "attention_output_bias": bias, **_qwen_window(config)}


def _qwen3_fields(arch: Architecture) -> dict[str, Any]:
    return _qwen_window_fields(arch) | {"attention_bias": arch.qkv_bias, "head_dim": arch.kv_channels}


FAMILIES = (
    Family(
        model_type="llama",
        name="Llama",
        models="Llama 2 and 3, TinyLlama, SmolLM2",
        options=_llama_options,
        fields=_llama_fields,
    ),
    Family(
        model_type="mistral",
        name="Mistral",
        models="Mistral 7B",
        options=_mistral_options,
        fields=_mistral_fields,
    ),
    Family(
        model_type="qwen2",
        name="Qwen2",
        models="Qwen2, Qwen2.5",
        options=_qwen2_options,
        fields=_qwen2_fields,
    ),
    Family(
        model_type="qwen3",
        name="Qwen3",
        models="Qwen3 (dense)",
        options=_qwen3_options,
        fields=_qwen3_fields,
    ),
)
"""In the order of preference for the export of a model trained from scratch."""


def family_named(model_type: object) -> Family | None:
    """Return the family of a config.json's model_type, None if it is not supported."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def family_of(arch: Architecture) -> Family:
    """Return the first family whose configuration can express `arch`.

    Raises:
        WeightsError: no family can; names the options.
    """
    from huggingface_hub.errors import StrictDataclassError

    for family in FAMILIES:
        try:
            if family.architecture(family.config(arch)) == arch:
                return family
        except (SlmError, StrictDataclassError):  # some families reject some shapes
            continue
    options = ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm", "sliding_window", "full_attention_layers")
    enabled = {name: getattr(arch, name) for name in options if getattr(arch, name)}
    raise WeightsError(
        "model architecture",
        enabled,
        f"match a family in transformers ({', '.join(family.name for family in FAMILIES)})",
        "train with another combination of --add-qkv-bias, --qk-layernorm and --window-size",
    )
