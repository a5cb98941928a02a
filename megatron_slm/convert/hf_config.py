"""Between a Hugging Face folder's config.json and an `Architecture`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_slm.config.architecture import ROPE_FIELDS, Architecture
from megatron_slm.convert.families import FAMILIES, Family, family_named, family_of
from megatron_slm.errors import LayoutError, WeightsError

CONFIG = "config.json"


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        WeightsError: no readable config.json, or a model whose mathematics differ from ours; the field is named.
    """
    return architecture_of(read_config(folder), str(folder / CONFIG))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        WeightsError: it cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(str(path), error.strerror, "is a readable file", "name a Hugging Face folder") from error
    except ValueError as error:
        raise WeightsError(str(path), str(error), "is JSON", "download the folder again") from error
    if not isinstance(loaded, dict):
        raise WeightsError(str(path), type(loaded).__name__, "is a JSON object", "download the folder again")
    return loaded


def architecture_of(raw: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that the content of a config.json describes.

    Args:
        where: the file, for errors.

    Raises:
        WeightsError: what it describes is not supported; the field is named.
    """
    family = _checked_family(raw, where)
    _check_rope(raw, where)
    try:
        config = family.config_class().from_dict(dict(raw))  # fills defaults, and reads RoPE's old and new fields
    except Exception as error:  # transformers and its validation raise anything
        raise WeightsError(
            where,
            f"{type(error).__name__}: {error}",
            f"is read by transformers as a {family.name}Config",
            "download the folder again, or update transformers",
        ) from error
    _check_windows(config, where)
    try:
        return family.architecture(config)
    except LayoutError as error:
        raise WeightsError(f"{where}: {error.field}", error.value, error.rule, error.fix) from error


def _checked_family(raw: Mapping[str, Any], where: str) -> Family:
    family = family_named(raw.get("model_type"))

    def refuse(field: str, rule: str, fix: str = "use a model of these") -> None:
        raise WeightsError(f"{where}: {field}", raw.get(field), rule, fix)

    if family is None:
        known = "; ".join(f"{one.model_type} ({one.models})" for one in FAMILIES)
        raise WeightsError(
            f"{where}: model_type", raw.get("model_type"), f"is one of {known}", "use a model of these families"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is silu (SwiGLU)")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        refuse("auto_map", "names no code of the folder's own (trust_remote_code), which may compute anything else")
    if raw.get("quantization_config"):
        refuse("quantization_config", "is absent: weights are full numbers", "use the model before its quantization")
    classes = raw.get("architectures")
    if classes and family.causal_lm not in classes:
        refuse("architectures", f"is {family.causal_lm}: a decoder with a language-modeling head")
    return family


def _check_rope(raw: Mapping[str, Any], where: str) -> None:
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise WeightsError(
            f"{where}: {field}.rope_type",
            kind,
            f"is one of {', '.join(ROPE_FIELDS)}",
            "use a model without it, or drop the scaling if you train within the original length",
        )
    turned = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if turned not in (None, 1, 1.0):
        raise WeightsError(f"{where}: partial_rotary_factor", turned, "is 1 or absent", "use another model")


def _check_windows(config: Any, where: str) -> None:
    """Which blocks have a window: none, all, or (Qwen) those after the first few."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return
    num_full = sum(kind == "full_attention" for kind in kinds)
    windowed = len(kinds) - num_full
    usual = ["full_attention"] * num_full + ["sliding_attention"] * windowed
    by_type = config.model_type in ("qwen2", "qwen3")
    if list(kinds) != usual or (windowed and (config.sliding_window is None or not by_type)):
        raise WeightsError(
            f"{where}: layer_types",
            kinds,
            "is full_attention, or for Qwen full_attention and then sliding_attention with a sliding_window",
            "use another model",
        )


def exported_config(
    arch: Architecture,
    carried: Mapping[str, Any] | None,
    *,
    dtype: str | None,
    special_ids: Mapping[str, int | None],
) -> dict[str, Any]:
    """The content of an exported config.json.

    Args:
        carried: the config.json the model once came with, which is kept but for what has changed; None for a model
            that was born here.
        dtype: what the weights are written in; None keeps what `carried` says.
        special_ids: bos_token_id and eos_token_id, for a model that was born here.

    Raises:
        WeightsError: `carried` is of another architecture, or no family of transformers' can express this one.
    """
    if carried is None:
        config = family_of(arch).config(arch, dtype=dtype, **special_ids)
        return json.loads(config.to_json_string(use_diff=False))
    where = f"origin/{CONFIG}"
    then = architecture_of(carried, where)
    if replace(then, vocab_size=arch.vocab_size) != arch:
        raise WeightsError(where, then, "describes the checkpoint's architecture", "do not change it")
    out = dict(carried)
    if then.vocab_size != arch.vocab_size:
        out["vocab_size"] = arch.vocab_size
    names = [name for name in ("dtype", "torch_dtype") if name in out] or ["dtype"]  # torch_dtype is the older name
    if dtype is not None:
        out.update(dict.fromkeys(names, dtype))
    return out
