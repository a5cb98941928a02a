"""Rotary fields of config.json: both generations of transformers read what a trained model is; imports stay as they are."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.hf_config import architecture_of, exported_config
from megatron_slm.errors import ConfigError, WeightsError
from megatron_slm.flags.load import parse
from tests.support.families import FAMILIES, LLAMA3_ROPE, family_model, save_family
from tests.support.runs import MODEL_FLAGS, flags, run_flags, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
OLD_SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear, first name": {"type": "linear", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3,
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn as in Qwen's model cards": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
        "long_factor": [1.0, 2.0, 4.0], "short_factor": [1.0, 1.0, 1.5],
    },
}  # fmt: skip
OLD_CONFIG = {
    "model_type": "llama", "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 97, "rope_theta": 500.0, "rope_scaling": None,
    "max_position_embeddings": 64, "torch_dtype": "float32", "head_dim": 6,
}  # fmt: skip
OLD_LENGTH = {"original_max_position_embeddings": 16}
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
    raw = {**OLD_CONFIG, "model_type": model_type, "rope_scaling": OLD_SCALINGS[scaling]}
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


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "yarn", "factor": 4.0, **OLD_LENGTH}])
def test_a_trained_import_of_transformers_4_gets_the_new_fields_too(scaling: dict[str, Any] | None) -> None:
    raw = {**OLD_CONFIG, "rope_scaling": scaling}
    config = export(raw, is_trained=True)
    assert {key: config[key] for key in raw} == raw, "its own fields stay"
    new = config["rope_parameters"]
    assert new.pop("rope_theta") == 500.0
    expected = {"rope_type": "default"} if scaling is None else {**scaling}
    expected["rope_type"] = expected.pop("type", expected.get("rope_type"))
    assert new == expected


@pytest.mark.parametrize("from_transformers", [4, 5])
def test_longer_contexts(from_transformers: int) -> None:
    """A raised base, a scaling and a new longest sequence, which the run's flags gave an imported model."""
    raw = OLD_CONFIG if from_transformers == 4 else written_by_transformers_5("llama 3")
    imported = architecture_of(raw, "config.json")
    yarn = {"rope_type": "yarn", "factor": 4.0, **OLD_LENGTH}
    for changes in ({"rotary_base": 9000.0}, {"rotary_base": 9000.0, "rope_scaling": yarn}, {"rope_scaling": {}}):
        arch = replace(imported, max_position_embeddings=256, **changes)
        config = exported_config(arch, raw, dtype=None, special_ids={}, is_trained=True)
        assert architecture_of(config, "config.json") == arch
        assert config["max_position_embeddings"] == 256
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == arch.rotary_base
        assert config["rope_scaling"] == (arch.rope_scaling or None)
        for old_or_new in ("rope_parameters", "rope_scaling"):
            one = {key: value for key, value in config.items() if key != old_or_new}
            assert architecture_of(one, "config.json") == arch, f"without {old_or_new}"
        with pytest.raises(WeightsError, match=r"must be .* as in the checkpoint"):
            exported_config(arch, raw, dtype=None, special_ids={}, is_trained=False)


@pytest.mark.parametrize("name", ["phi-4-mini with longrope", "gemma 3", "olmo 3", "glm-4"])
def test_longer_contexts_of_families_with_fields_of_their_own(name: str) -> None:
    raw = written_by_transformers_5(name)
    arch = replace(architecture_of(raw, "config.json"), rotary_base=9000.0, max_position_embeddings=256)
    if name == "olmo 3":  # has one base, and transformers 4 no other for blocks with a window
        arch = replace(arch, local_rotary_base=9000.0)
    if name.startswith("phi"):
        arch = replace(arch, rope_scaling={**arch.rope_scaling, "original_max_position_embeddings": 32})
    config = exported_config(arch, raw, dtype=None, special_ids={}, is_trained=True)
    assert architecture_of(config, "config.json") == arch
    assert config["rope_theta"] == 9000.0, "transformers 4 reads this"
    without_new = {key: value for key, value in config.items() if key != "rope_parameters"}
    if name != "olmo 3":  # whose old base transformers 5 forgets for blocks with a window
        assert architecture_of(without_new, "config.json") == arch
    if name.startswith("phi"):
        assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}, "transformers 4 takes no other"
        assert config["original_max_position_embeddings"] == 32


def resolved(imported: Architecture, *, starts: bool, **given: Any) -> Architecture:
    unset = dict.fromkeys(key.replace("-", "_") for key in (*MODEL_FLAGS, "init_method_std"))
    values = run_flags(Path("corpus"), Path("run"), **{**unset, **given})
    return resolve_architecture(parse(flags(values))[0], imported, 97, starts=starts)


def test_blocks_with_a_window_stay_unscaled() -> None:
    raw = written_by_transformers_5("olmo 3")
    plain = {"rope_type": "default", "rope_theta": 500.0}
    raw = {**raw, "rope_parameters": {"full_attention": plain, "sliding_attention": plain}}
    yarn = {"rope_type": "yarn", "factor": 4.0, **OLD_LENGTH}
    arch = resolved(architecture_of(raw, "config.json"), starts=True, rope_scaling=json.dumps(yarn))
    assert (arch.rope_scaling, arch.rotary_base, arch.local_rotary_base) == (yarn, 500.0, 500.0)
    config = exported_config(arch, raw, dtype=None, special_ids={}, is_trained=True)
    assert architecture_of(config, "config.json") == arch


def test_flags_may_encode_the_positions_of_a_start_in_another_way() -> None:
    imported = architecture_of(OLD_CONFIG, "config.json")
    yarn = {"rope_type": "yarn", "factor": 4.0, **OLD_LENGTH}
    given = {"rotary_base": 9000.0, "max_position_embeddings": 256}
    found = resolved(imported, starts=True, rope_scaling=json.dumps(yarn), **given)
    assert found == replace(imported, rope_scaling=yarn, **given)
    with pytest.raises(ConfigError, match=r"--rotary-base is 9000.0: must match the checkpoint \(500.0\)"):
        resolved(imported, starts=False, rotary_base=9000.0)
    with pytest.raises(ConfigError, match="--hidden-size is 8: must match the checkpoint"):
        resolved(imported, starts=True, hidden_size=8)
    with pytest.raises(ConfigError, match=r"--rope-scaling\.factor is missing"):
        resolved(imported, starts=True, rope_scaling='{"rope_type": "yarn"}')
    for name, local_base in (("olmo 3", 9000.0), ("gemma 3", 50.0)):
        arch = architecture_of(written_by_transformers_5(name), "config.json")
        found = resolved(arch, starts=True, rotary_base=9000.0)
        assert (found.rotary_base, found.local_rotary_base) == (9000.0, local_base), "one base of all blocks, or two"
    scaled = replace(imported, rope_scaling=LLAMA3)
    assert resolved(scaled, starts=True, rope_scaling='{"rope_type": "default"}') == imported


def test_a_run_for_longer_contexts(tmp_path: Path) -> None:
    """From the flags to a folder that transformers computes the same from; the reference keeps its own positions."""
    hf, run = save_family("llama 3", tmp_path / "hf"), tmp_path / "run"
    given = {"rotary_base": 9000.0, "max_position_embeddings": 256, "rope_scaling": '{"rope_type": "default"}'}
    values = run_flags(
        write_corpus(tmp_path / "corpus"), run, init_from=hf, reference_load="init", objective="slm", train_iters=1,
        save=run / "saved", save_interval=1, **{key.replace("-", "_"): None for key in MODEL_FLAGS}, **given,
        init_method_std=None,
    )  # fmt: skip
    run_world(train_and_report, 1, values)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(line["loss_all"] - line["reference_loss"]) > 1e-3, "the same weights, other positions"
    done = export_checkpoint(str(run / "saved"), str(tmp_path / "again"))
    assert done.report is not None
    assert done.report.max_nats <= 1e-5
    config = json.loads((done.folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["max_position_embeddings"]) == (9000.0, None, 256)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 9000.0}
