"""The families of Hugging Face models that are understood: which of transformers' classes, and what each fixes.

A family turns a transformers configuration into an `Architecture` and back. Names of weights are the same in all
of them; they are the logical names that checkpoints use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import SlmError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, by transformers' names."""

    model_type: str
    """As config.json has it."""
    name: str
    """What the names of its classes begin with."""
    models: str
    """Models that are released in it."""
    options: Callable[[Any], dict[str, Any]]
    """From a configuration, the fields of an `Architecture` that not all families have."""
    fields: Callable[[Architecture], dict[str, Any]]
    """The other way round."""

    @property
    def causal_lm(self) -> str:
        """The class that predicts the next token."""
        return f"{self.name}ForCausalLM"

    def config_class(self) -> Any:
        """Its configuration's class in transformers."""
        import transformers

        return getattr(transformers, f"{self.name}Config")

    def config(self, arch: Architecture, **others: Any) -> Any:
        """A configuration of this family; whether it says all that `arch` does is for `architecture` to see."""
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
        """What a configuration of this family says; its rope_type is one that is known.

        Raises:
            LayoutError: the numbers do not fit together.
        """
        rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}  # the old rope_type
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
    """The window of the last blocks: transformers lists each block's kind, made from max_window_layers."""
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
    usual = arch.kv_channels * arch.num_attention_heads == arch.hidden_size  # it has no field for another head width,
    return _qwen_window_fields(arch) | ({} if usual else {"head_dim": arch.kv_channels})  # but its code reads one


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
"""In the order in which they are tried for a model that was born here."""


def family_named(model_type: object) -> Family | None:
    """The family of a config.json's model_type; None if it is not known."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def family_of(arch: Architecture) -> Family:
    """The first family whose configuration says everything that `arch` does.

    Raises:
        WeightsError: none does; the options are named.
    """
    from huggingface_hub.errors import StrictDataclassError

    for family in FAMILIES:
        try:
            if family.architecture(family.config(arch)) == arch:
                return family
        except (SlmError, StrictDataclassError):  # transformers refuses some shapes in some families
            continue
    options = ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm", "sliding_window", "full_attention_layers")
    given = {name: getattr(arch, name) for name in options if getattr(arch, name)}
    raise WeightsError(
        "architecture",
        given,
        f"is that of a family that transformers has ({', '.join(family.name for family in FAMILIES)})",
        "train with another combination of --add-qkv-bias, --qk-layernorm and --window-size",
    )
