"""One family of Hugging Face models: its transformers classes, and its configurations as an `Architecture` and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.windows import FULL, SLIDING
from megatron_slm.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models in transformers.

    Checkpoints have Llama's names of weights as logical names, whatever the family's own are.
    """

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
    config_name: str | None = None
    """Class of the configuration in transformers; None for that of the prefix."""
    activation_field: str = "hidden_act"
    """Field of the activation in config.json."""
    activations: tuple[str, ...] = ("silu", "swish")
    """Its supported values, the default first."""
    reads_layer_types: bool = False
    """Its models take each block's kind from `layer_types`."""
    rope_by_kind: bool = False
    """Blocks with a window have rotary fields of their own (`rope_parameters` by kind)."""
    partial_rotary: bool = False
    """RoPE may rotate a part of each head (`partial_rotary_factor`)."""
    stored_modules: Mapping[str, str] = field(default_factory=dict)
    """Name of a module in the folder by its logical name, where it is another; several of one name are fused in it."""

    @property
    def causal_lm(self) -> str:
        """Name of the causal language model class."""
        return f"{self.name}ForCausalLM"

    def config_class(self) -> Any:
        """Return the configuration class in transformers."""
        import transformers

        return getattr(transformers, self.config_name or f"{self.name}Config")

    def config(self, arch: Architecture, **others: Any) -> Any:
        """Build a configuration of this family; options of `arch` that the family lacks are lost (see `family_of`)."""
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
            tie_word_embeddings=arch.tied,
            initializer_range=arch.initializer_range,
            **{"rope_parameters": self._rope(arch), **self.fields(arch), **others},
        )

    def _rope(self, arch: Architecture) -> dict[str, Any]:
        rope = {"rope_type": "default", **arch.rope_scaling, "rope_theta": arch.rotary_base}
        if self.rope_by_kind:
            local = arch.rotary_base if arch.local_rotary_base is None else arch.local_rotary_base
            return {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": local}}
        return {**rope, "partial_rotary_factor": arch.rotary_percent} if self.partial_rotary else rope

    def architecture(self, config: Any) -> Architecture:
        """Return the architecture of a configuration of this family, whose rope_type must be supported.

        Raises:
            LayoutError: the sizes contradict each other, or the family has no such architecture here.
        """
        rope = config.rope_parameters
        options = self.options(config)
        if self.rope_by_kind:
            rope, local = rope[FULL], rope[SLIDING]
            if local.get("rope_type", "default") != "default":
                rule = "be default: blocks with a window have no scaling"
                raise LayoutError(f"rope_parameters.{SLIDING}.rope_type", local["rope_type"], rule, "use another model")
            has_windows = options.get("sliding_window") is not None
            options["local_rotary_base"] = float(local["rope_theta"]) if has_windows else None
        rope = {key: value for key, value in rope.items() if key != "type"}  # old name of rope_type
        base = float(rope.pop("rope_theta"))
        rotary_percent = rope.pop("partial_rotary_factor", 1.0) if self.partial_rotary else 1.0
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
            rotary_percent=rotary_percent,
            tied=config.tie_word_embeddings,
            initializer_range=config.initializer_range,
            **options,
        )


def default_width(arch: Architecture) -> bool:
    """Tell whether the heads together have the hidden size's width, the default of configurations."""
    return arch.kv_channels * arch.num_attention_heads == arch.hidden_size
