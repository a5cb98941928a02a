"""Folders that are damaged, incomplete or not supported: one error that names what is wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.hf_config import read_architecture
from megatron_slm.convert.hf_source import HuggingFaceSource
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.source import open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.convert.verify import verify
from megatron_slm.errors import SlmError, VocabularyError, WeightsError
from megatron_slm.parallel.shards import Part
from tests.convert.tokenizers import save_tokenizer
from tests.support.families import family_model, save_family
from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import WorldError, run_world

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_hf_llama(tmp_path / "hf")


@pytest.fixture
def sharded(hf: Path, tmp_path: Path) -> Path:
    import_folder(str(hf), str(tmp_path / "whole"))
    return export_checkpoint(str(tmp_path / "whole"), str(tmp_path / "sharded"), shard_bytes=20_000).folder


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(SlmError, match=match):
        import_folder(str(folder), str(folder.parent / "refused"), **options)
    assert not list(folder.parent.glob("refused/*")), "nothing is left of it"


def change(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_no_folder_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError,
        match=r"--init-from is '.*absent': must be a local folder or a model of the hub .* Fix: check the path$",
    ):
        open_model(str(tmp_path / "absent"), field="--init-from")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"must be a Hugging Face folder .* or hold a complete checkpoint"):
        open_model(str(tmp_path / "empty"), field="--init-from")
    refused(tmp_path / "empty", r"--hf is '.*empty': must be a Hugging Face folder")
    refused(tmp_path / "absent", r"--hf is '.*absent': must be a local folder")


def test_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, holder = (index["weight_map"][f"model.{name}.weight"] for name in ("embed_tokens", "norm"))
    assert first != holder

    def with_map(**changes: str | None) -> None:
        weight_map = {k: v for k, v in {**index["weight_map"], **changes}.items() if v is not None}
        (sharded / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))

    with_map(**{"model.layers.7.mlp.up_proj.weight": first})
    refused(sharded, rf"up_proj.weight is '{first}': must name the file that holds this tensor \(none does\)")
    with_map(**{"model.norm.weight": first})
    refused(sharded, rf"weight_map.model.norm.weight is '{first}': must name the file that .* \({holder}\)")
    with_map(**{"model.norm.weight": None})
    refused(sharded, rf"weight_map.model.norm.weight is missing: required by {holder}")
    with_map(**{"model.norm.weight": "../elsewhere.safetensors"})
    refused(sharded, r"weight_map is '../elsewhere.safetensors': must name only files of its own folder")
    (sharded / INDEX).write_text("{")
    refused(sharded, "must be JSON with a weight_map")
    with_map()
    (sharded / first).unlink()
    refused(sharded, f"{first} is missing: required by {INDEX}")


def test_files_that_are_not_the_models_are_passed_over(hf: Path, tmp_path: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.ones(3)}, hf / "consolidated.safetensors")
    import_folder(str(hf), str(tmp_path / "ours"))


def test_tensors(hf: Path) -> None:
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"
    whole = (hf / "model.safetensors").read_bytes()
    rewrite(hf, **{up: torch.ones(40, 23)})
    refused(hf, rf"--hf: shape of {up} in .*/model.safetensors is \(40, 23\): must be \(40, 24\)")
    (hf / "model.safetensors").write_bytes(whole)
    rewrite(hf, **{up: None})
    refused(hf, rf"--hf: {up} is missing: required by the model's configuration, with shape \(40, 24\)")
    (hf / "model.safetensors").write_bytes(whole)
    for dtype, name in ((torch.float64, "float64"), (torch.float8_e4m3fn, "uint8"), (torch.int8, "uint8")):
        rewrite(hf, **{norm: torch.ones(24).to(dtype)})
        refused(hf, rf"--hf: dtype of {norm} in .*/model.safetensors is '{name}': must be one of bfloat16, float16")
        (hf / "model.safetensors").write_bytes(whole)
    rewrite(hf, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(6)})
    refused(hf, r"tensor in .*model.safetensors is '.*q_norm.weight': must belong to the architecture")
    (hf / "model.safetensors").write_bytes(whole)
    rewrite(hf, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})  # which old folders have
    check_tensors(read_architecture(hf), HuggingFaceSource(hf), field="--hf")
    (hf / "model.safetensors").write_bytes(whole[:-100])
    refused(hf, r"weight file is '.*/model.safetensors': must be an undamaged safetensors file")


def test_a_source_that_is_asked_for_what_it_has_not(hf: Path) -> None:
    source = HuggingFaceSource(hf)
    with pytest.raises(WeightsError, match="nothing is missing: required by the model's architecture"):
        source.read("weight", Part(name="nothing", shape=(3,)), 0, 3)
    with pytest.raises(WeightsError, match=r"shape of model.norm.weight is \(24,\): must be \(3,\)"):
        source.read("weight", Part(name="model.norm.weight", shape=(3,)), 0, 3)


ROPE = {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("llama 2", {"model_type": "gpt2"}, r"model_type is 'gpt2': must be one of llama \(Llama 2 and 3"),
        ("llama 2", {"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ("llama 2", {"model_type": None}, "model_type is missing"),
        ("llama 2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama 2", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*must be LlamaForCausalLM"),
        ("llama 2", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ("llama 2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama 2", {"rope_parameters": {"rope_type": "proportional", **ROPE}}, "rope_type is 'proportional': must be one"),
        ("llama 2", {"rope_parameters": {"rope_type": "yarn", "factor": None, **ROPE}}, "rope_scaling.factor is missing"),
        ("llama 2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": 2, **ROPE}}, "truncate is 2"),
        (
            "llama 2",
            {"rope_parameters": None, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            r"rope_scaling.long_factor is \[2.0\]: must be a list of 3 positive numbers",
        ),
        ("llama 2", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, **ROPE}}, "KeyError|low_freq_factor"),
        ("llama 2", {"rope_parameters": {"rope_type": "default", "extra": 3, **ROPE}}, r"rope_scaling.extra is 3"),
        ("llama 2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama 2", {"num_key_value_heads": 3}, "config.json: .*num_attention_heads.* is 4"),
        ("llama 2", {"num_hidden_layers": "three"}, "must load in transformers as a LlamaConfig .*num_hidden_layers"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window.* is 0"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
    ],
)  # fmt: skip
def test_architectures_that_are_not_supported(name: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder = save_family(name, tmp_path / "hf")
    change(folder, **changes)
    refused(folder, match)


def test_a_configuration_of_another_model(tmp_path: Path) -> None:
    """Families differ in their biases and norms, so a changed model_type does not go through."""
    folder = save_family("qwen2", tmp_path / "hf")
    change(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    refused(folder, r"is '.*k_proj.bias': must belong to the architecture")


def test_unreadable_configurations(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="must be a readable file"):
        read_architecture(tmp_path)
    for text, match in (("{", "must be valid JSON"), ("[]", "must be a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=match):
            read_architecture(tmp_path)


def test_old_and_new_ways_to_write_rope(hf: Path) -> None:
    raw = json.loads((hf / "config.json").read_text())
    raw.pop("rope_parameters")
    old = {**raw, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (hf / "config.json").write_text(json.dumps(old))
    arch = read_architecture(hf)
    assert (arch.rotary_base, arch.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    (hf / "config.json").write_text(json.dumps({**raw, "rope_theta": 5e5, "rope_scaling": None}))
    assert read_architecture(hf).rope_scaling == {}


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


def as_bin(folder: Path, *, shards: int = 1, **options: Any) -> Path:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_bin_folders(shards: int, zipped: bool, hf: Path, tmp_path: Path) -> None:
    before = load_file(hf / "model.safetensors")
    as_bin(hf, shards=shards, **({} if shards > 1 else {"_use_new_zipfile_serialization": zipped}))
    with pytest.raises(WeightsError, match=r"model.safetensors is missing: .*pickled.*--allow-bin"):
        open_model(str(hf), field="--init-from")
    refused(hf, "--allow-bin")
    import_folder(str(hf), str(tmp_path / "ours"), allow_bin=True)
    assert verify(str(hf), str(tmp_path / "ours"), num_tokens=64).max_nats <= 1e-5
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out")).folder
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bin_files_that_hold_more_than_tensors(hf: Path, tmp_path: Path) -> None:
    marker = tmp_path / "made by a pickle"
    trap = pickle.dumps(Pickled(marker))
    pickle.loads(trap)
    assert marker.exists(), "the trap works"
    marker.unlink()
    as_bin(hf)
    state = torch.load(hf / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "model.norm.weight": Pickled(marker)}, hf / "pytorch_model.bin")
    refused(hf, "must hold nothing but tensors", allow_bin=True)
    (hf / "pytorch_model.bin").write_bytes(trap)
    refused(hf, "must hold nothing but tensors", allow_bin=True)
    assert not marker.exists()
    torch.save({**state, "epoch": 3}, hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin: epoch is 'int': must be a tensor", allow_bin=True)


def test_more_tokens(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(90)]
    hf = save_tokenizer(save_family("llama 2", tmp_path / "hf"), words)  # 97 rows, 90 tokens
    longer = save_tokenizer(tmp_path / "longer", [*words, *(f"new{i}" for i in range(20))])
    import_folder(str(hf), str(tmp_path / "ours"), extend_vocabulary=str(longer))
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert out.report is not None
    assert out.report.max_nats <= 1e-5
    before, after = load_file(hf / "model.safetensors"), load_file(out.folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:90], before[name][:90])
        mean = before[name][:90].double().mean(0).float()
        assert torch.allclose(after[name][90:], mean.expand(20, -1), atol=1e-7)
    config = json.loads((out.folder / "config.json").read_text())
    assert config == {**json.loads((hf / "config.json").read_text()), "vocab_size": 110}
    assert (out.folder / "tokenizer.json").read_bytes() == (longer / "tokenizer.json").read_bytes()
    within = save_tokenizer(tmp_path / "within", [*words, "new"])  # there is a row for it already
    for init in ("mean", "keep"):
        import_folder(str(hf), str(tmp_path / init), extend_vocabulary=str(within), extend_init=init)
        export_checkpoint(str(tmp_path / init), str(tmp_path / f"{init}_out"), verifies=False)
        after = load_file(tmp_path / f"{init}_out" / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = before[name][:90].double().mean(0).float()
            assert torch.equal(after[name][:90], before[name][:90])
            assert torch.allclose(after[name][90], mean if init == "mean" else before[name][90], atol=1e-7)
            assert torch.equal(after[name][91:], before[name][91:]), "rows without a token stay"


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(97)]
    hf = save_tokenizer(save_hf_llama(tmp_path / "hf"), words)
    other = save_tokenizer(tmp_path / "other", [*words[:50], "another", *words[51:], "more"])
    refused(hf, "token 50 of .*other is 'another': must be 'w50'", extend_vocabulary=str(other))
    shorter = save_tokenizer(tmp_path / "shorter", words[:90])
    refused(hf, "token 90 of .*shorter is missing: must be 'w90'", extend_vocabulary=str(shorter))
    save_tokenizer(hf, [*words, "more"])
    with pytest.raises(VocabularyError, match=r"is 98: must be at most 97.*--extend-vocabulary"):
        import_folder(str(hf), str(tmp_path / "x"))
    import_folder(str(hf), str(tmp_path / "ours"), extend_vocabulary=str(hf))
    bare = save_hf_llama(tmp_path / "bare")
    refused(bare, "--hf: tokenizer is missing: required by --extend-vocabulary", extend_vocabulary=str(shorter))


@pytest.mark.parametrize("flag", ["init_from", "reference_load"])
def test_training_refuses_the_same_before_its_first_step(flag: str, hf: Path, tmp_path: Path) -> None:
    """A tensor too many, which no shape of the model's own tells."""
    corpus = write_corpus(tmp_path / "corpus")
    rewrite(hf, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(6)})
    changes: dict[str, Any] = {flag: hf, "objective": "slm" if "reference" in flag else "clm"}
    if flag == "init_from":
        changes |= dict.fromkeys(
            (
                "num_layers",
                "hidden_size",
                "ffn_hidden_size",
                "num_attention_heads",
                "num_query_groups",
                "init_method_std",
            )
        )
    wanted = rf"--{flag.replace('_', '-')}: tensor in .* is 'model.layers.0.self_attn.q_norm.weight': must belong"
    with pytest.raises(WorldError, match=wanted):
        run_world(train_and_report, 1, run_flags(corpus, tmp_path / "run", **changes))


def test_every_family_is_told_from_the_others_by_its_tensors() -> None:
    names = {name: frozenset(family_model(name).state_dict()) for name in ("llama 2", "qwen2", "qwen3")}
    assert len(set(names.values())) == 3
