"""Conversion between a Hugging Face config.json and an `Architecture`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.resolve import POSITIONS
from megatron_slm.config.rope_scaling import ROPE_FIELDS
from megatron_slm.convert.families import FAMILIES, Family, family_named, family_of
from megatron_slm.errors import LayoutError, WeightsError
from megatron_slm.hub import local_path

CONFIG = "config.json"


def is_hf_folder(path: Path) -> bool:
    """Return True if a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def model_folder(path: str, *, field: str) -> Path:
    """Return the folder of a model: the path, or the cached folder of a name of the hub.

    Args:
        field: the flag that names the model.

    Raises:
        WeightsError: no such folder.
        ConfigError, ServiceError: no such model on the hub, or no way to it.
    """
    folder = local_path(path, field=field)
    if not folder.is_dir():
        raise WeightsError(field, path, "be a local folder or a model of the hub (org/name)", "check the path")
    return folder


def hf_folder(path: str, *, field: str) -> Path:
    """Return the folder of a Hugging Face model: the path, or the cached folder of a name of the hub.

    Args:
        field: the flag that names the model.

    Raises:
        WeightsError: no such folder, or no config.json in it.
        ConfigError, ServiceError: no such model on the hub, or no way to it.
    """
    folder = model_folder(path, field=field)
    if not is_hf_folder(folder):
        raise WeightsError(field, path, f"be a Hugging Face folder (with a {CONFIG})", "check the path")
    return folder


def read_architecture(folder: Path) -> Architecture:
    """Read the architecture of a Hugging Face folder.

    Raises:
        WeightsError: config.json is unreadable or describes an unsupported model; names the field.
    """
    return architecture_of(read_config(folder), str(folder / CONFIG))


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        WeightsError: the file is unreadable or not a JSON object.
    """
    path = folder / CONFIG
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            CONFIG, str(path), f"be a readable file ({error.strerror})", "name a Hugging Face folder"
        ) from error
    except ValueError as error:
        raise WeightsError(CONFIG, str(path), f"be valid JSON ({error})", "download the folder again") from error
    if not isinstance(loaded, dict):
        raise WeightsError(CONFIG, str(path), "be a JSON object", "download the folder again")
    return loaded


def architecture_of(raw: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture that a config.json describes.

    Args:
        raw: content of the config.json.
        where: the file, for errors.

    Raises:
        WeightsError: the model is not supported; names the field.
    """
    family = _checked_family(raw, where)
    _check_rope(raw, where, partial=family.partial_rotary)
    try:
        # fills in defaults, reads RoPE's old and new fields, and edits nested ones: those of a copy
        config = family.config_class().from_dict(deepcopy(dict(raw)))
    except Exception as error:  # transformers and its validation raise errors of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightsError(
            f"{where}: model_type",
            family.model_type,
            f"load in transformers as a {family.name}Config ({reason})",
            "download the folder again, or update transformers",
        ) from error
    kinds = getattr(config, "layer_types", None) or []
    if not family.reads_layer_types and set(kinds) - {"full_attention"}:
        raise WeightsError(f"{where}: layer_types", kinds, "be full_attention throughout", "use another model")
    try:
        return family.architecture(config)
    except LayoutError as error:
        raise WeightsError(f"{where}: {error.field}", error.value, error.rule, error.fix) from error


def _checked_family(raw: Mapping[str, Any], where: str) -> Family:
    family = family_named(raw.get("model_type"))

    def reject(key: str, rule: str, fix: str) -> WeightsError:
        return WeightsError(f"{where}: {key}", raw.get(key), rule, fix)

    if family is None:
        known = "; ".join(f"{one.model_type} ({one.models})" for one in FAMILIES)
        raise reject("model_type", f"be one of {known}", "use a model of a supported family")
    activation = family.activation_field
    if (raw.get(activation) or family.activations[0]) not in family.activations:
        raise reject(activation, f"be {family.activations[0]}", "use a model with this activation")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        raise reject(
            "auto_map", "not name custom model code (trust_remote_code)", "use a model that transformers implements"
        )
    if raw.get("quantization_config"):
        raise reject("quantization_config", "be absent: quantized weights are not supported", "use the original model")
    classes = raw.get("architectures")
    if classes and family.causal_lm not in classes:
        raise reject("architectures", f"be {family.causal_lm}", "use a model with a language-modeling head")
    return family


_OLD_NAMES = {"su": "longrope"}
"""First names of scalings."""


def _check_rope(raw: Mapping[str, Any], where: str, *, partial: bool) -> None:
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if _OLD_NAMES.get(kind, kind) not in ROPE_FIELDS:
        raise WeightsError(
            f"{where}: {field}.rope_type",
            kind,
            f"be one of {', '.join(ROPE_FIELDS)}",
            "use another model, or remove the scaling if you train within the original context length",
        )
    rotated_share = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if rotated_share not in (None, 1, 1.0) and not partial:
        raise WeightsError(f"{where}: partial_rotary_factor", rotated_share, "be 1 or absent", "use another model")


def exported_config(
    arch: Architecture,
    original: Mapping[str, Any] | None,
    *,
    dtype: str | None,
    special_ids: Mapping[str, int | None],
    is_trained: bool,
) -> dict[str, Any]:
    """Return the content of an exported config.json.

    Args:
        original: config.json of the imported model, kept apart from changed fields; None for a model trained from
            scratch.
        dtype: dtype of the exported weights; None keeps the dtype in `original`.
        special_ids: bos_token_id and eos_token_id, for a model trained from scratch.
        is_trained: False for an import, whose fields stay as they are; else rotary fields are written for old and new
            versions of transformers.

    The architecture may encode positions in another way than `original`, after a run for longer contexts.

    Raises:
        WeightsError: `original` describes another architecture, or no transformers family can express this one.
    """
    if original is None:
        config = family_of(arch).config(arch, dtype=dtype, **special_ids)
        return with_old_rotary_fields(json.loads(config.to_json_string(use_diff=False)))
    where = f"origin/{CONFIG}"
    imported = architecture_of(original, where)
    moved = [name for name in POSITIONS if is_trained and getattr(arch, name) != getattr(imported, name)]
    for name, value in vars(arch).items():
        if name not in ("vocab_size", *moved) and value != getattr(imported, name):
            raise WeightsError(
                f"{where}: {name}", getattr(imported, name), f"be {value!r} as in the checkpoint", "restore the file"
            )
    out = _with_rotary_fields(original, arch, anew=bool(moved)) if is_trained else deepcopy(dict(original))
    if imported.vocab_size != arch.vocab_size:
        out["vocab_size"] = arch.vocab_size
    names = [name for name in ("dtype", "torch_dtype") if name in out] or ["dtype"]  # torch_dtype is the older name
    if dtype is not None:
        out.update(dict.fromkeys(names, dtype))
    return out


def _with_rotary_fields(original: Mapping[str, Any], arch: Architecture, *, anew: bool) -> dict[str, Any]:
    """Return a config.json with the rotary fields of old and new versions of transformers.

    Args:
        anew: the architecture encodes positions in another way than `original`.
    """
    out = deepcopy(dict(original))
    family = family_named(out["model_type"])
    assert family is not None, "its architecture was read"
    written = json.loads(family.config(arch).to_json_string(use_diff=False))
    if anew:
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            out.pop(name, None)
        out["max_position_embeddings"] = arch.max_position_embeddings
        if "original_max_position_embeddings" in written:
            out["original_max_position_embeddings"] = written["original_max_position_embeddings"]
    if not out.get("rope_parameters"):
        out["rope_parameters"] = written["rope_parameters"]
    return with_old_rotary_fields(out)


def with_old_rotary_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add `rope_theta` and `rope_scaling` to a config.json that has `rope_parameters` alone.

    transformers 4 ignores `rope_parameters`: without the old fields it would compute with a base of 10,000.
    """
    out = deepcopy(dict(config))
    new = out.get("rope_parameters") or {}
    rope = dict(new.get("full_attention") or new)
    base = rope.pop("rope_theta", None)
    if base is None:
        return out
    out.setdefault("rope_theta", base)
    if "sliding_attention" in new:
        out.setdefault("rope_local_base_freq", new["sliding_attention"]["rope_theta"])
    if "partial_rotary_factor" in rope:
        out.setdefault("partial_rotary_factor", rope.pop("partial_rotary_factor"))
    is_default = rope.get("rope_type", rope.get("type", "default")) == "default"
    if not is_default and "original_max_position_embeddings" in out:  # Phi's own three fields
        rope = {"type": rope["rope_type"], **{name: rope[name] for name in ("short_factor", "long_factor")}}
    out.setdefault("rope_scaling", None if is_default else rope)
    return out
