"""Rotary fields of config.json: both generations of transformers read what a trained model is; imports stay as they are."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from megatron_slm.convert.hf_config import architecture_of, exported_config
from tests.support.families import FAMILIES, LLAMA3_ROPE, family_model

LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
OLD_SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear, first name": {"type": "linear", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3,
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def written_by_transformers_5(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(family_model(name).config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return loaded


def export(raw: dict[str, Any], *, is_trained: bool) -> dict[str, Any]:
    arch = architecture_of(raw, "config.json")
    return exported_config(arch, raw, dtype=None, special_ids={}, is_trained=is_trained)


@pytest.mark.parametrize("scaling", OLD_SCALINGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_untouched_import_keeps_every_field(model_type: str, scaling: str) -> None:
    raw = {
        "model_type": model_type, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 97, "rope_theta": 500.0,
        "rope_scaling": OLD_SCALINGS[scaling], "max_position_embeddings": 64, "torch_dtype": "float32",
    }  # fmt: skip
    before = deepcopy(raw)
    assert architecture_of(raw, "config.json").rotary_base == 500.0
    assert raw == before, "reading changes nothing"
    assert json.dumps(export(raw, is_trained=False)) == json.dumps(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_imports_from_transformers_5_keep_every_field(name: str) -> None:
    raw = written_by_transformers_5(name)
    before = deepcopy(raw)
    assert json.dumps(export(raw, is_trained=False)) == json.dumps(before)
    assert raw == before


@pytest.mark.parametrize("from_scratch", [True, False])
@pytest.mark.parametrize(
    ("name", "theta", "scaling"),
    [
        ("qwen3", 10000.0, None),
        ("llama 3", 500.0, LLAMA3),
        ("tinyllama", 700.0, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_trained_models_have_old_and_new_rotary_fields(
    name: str, theta: float, scaling: dict[str, Any] | None, from_scratch: bool
) -> None:
    raw = written_by_transformers_5(name)
    arch = architecture_of(raw, "config.json")
    original = None if from_scratch else raw
    config = exported_config(arch, original, dtype="float32", special_ids={}, is_trained=True)
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling), "transformers 4 reads these"
    assert config["rope_parameters"] == raw["rope_parameters"], "transformers 5 reads these"
    assert architecture_of(config, "config.json") == arch
