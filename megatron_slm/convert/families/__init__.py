"""Supported families of Hugging Face models, one file for those of one kind.

A family converts a transformers configuration to an `Architecture` and back.
"""

from __future__ import annotations

from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.families.gemma import GEMMA2, GEMMA3
from megatron_slm.convert.families.glm import GLM4
from megatron_slm.convert.families.granite import GRANITE
from megatron_slm.convert.families.llama import LLAMA, MINISTRAL, MISTRAL, SMOLLM3
from megatron_slm.convert.families.olmo import OLMO2, OLMO3
from megatron_slm.convert.families.phi import PHI3
from megatron_slm.convert.families.qwen import QWEN2, QWEN3
from megatron_slm.errors import SlmError, WeightsError

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, MINISTRAL, SMOLLM3, GRANITE, PHI3, GLM4, OLMO2, OLMO3, GEMMA2, GEMMA3)
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
        except (SlmError, StrictDataclassError, KeyError, ValueError):  # some families reject some shapes
            continue
    options = ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm", "sliding_window", "full_attention_layers")
    enabled = {name: getattr(arch, name) for name in options if getattr(arch, name)}
    raise WeightsError(
        "model architecture",
        enabled,
        f"match a family in transformers ({', '.join(family.name for family in FAMILIES)})",
        "train with another combination of --add-qkv-bias, --qk-layernorm and --window-size",
    )
