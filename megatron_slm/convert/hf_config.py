"""Between a Hugging Face configuration and an `Architecture`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import WeightsError


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (path / "config.json").is_file()


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        WeightsError: no readable config.json, or a model that is not a Llama.
    """
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != "llama":
        raise WeightsError(
            f"{folder}/config.json: model_type", raw.get("model_type"), "is llama", "use a Llama-type checkpoint"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise WeightsError(
            f"{folder}/config.json: hidden_act", raw["hidden_act"], "is silu (SwiGLU)", "use such a model"
        )
    from transformers import LlamaConfig

    config = LlamaConfig.from_dict(raw)  # fills defaults, and reads RoPE fields in their old and new form
    rope = dict(config.rope_parameters)
    base = float(rope.pop("rope_theta"))
    rope.pop("type", None)  # the old name of rope_type, which transformers keeps beside it
    if rope.get("rope_type", "default") == "default":
        rope = {}
    return Architecture(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rotary_base=base,
        rope_scaling=rope,
        tied=config.tie_word_embeddings,
        qkv_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        initializer_range=config.initializer_range,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(str(path), error.strerror, "is a readable file", "name a Hugging Face folder") from error
    except ValueError as error:
        raise WeightsError(str(path), str(error), "is JSON", "download the folder again") from error
    if not isinstance(loaded, dict):
        raise WeightsError(str(path), type(loaded).__name__, "is a JSON object", "download the folder again")
    return loaded


def hf_config(arch: Architecture, *, dtype: str, bos_id: int | None, eos_id: int | None) -> Any:
    """A `LlamaConfig` that transformers loads the exported weights with.

    Raises:
        WeightsError: the architecture has an option that a Hugging Face Llama cannot express.
    """
    from transformers import LlamaConfig

    if arch.qkv_bias != arch.attention_output_bias or arch.sliding_window is not None:
        raise WeightsError(
            "architecture",
            "qkv bias without output bias" if arch.qkv_bias else "sliding window",
            "is expressible as a Hugging Face LlamaForCausalLM",
            "train without --add-qkv-bias and --window-size",
        )
    rope = {"rope_type": "default", **arch.rope_scaling, "rope_theta": arch.rotary_base}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.kv_channels,
        vocab_size=arch.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=arch.tied,
        attention_bias=arch.qkv_bias,
        mlp_bias=arch.mlp_bias,
        initializer_range=arch.initializer_range,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        dtype=dtype,
    )
