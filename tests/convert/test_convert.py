"""Trained runs out, the commands, and what a published folder says of itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_slm.checkpoint.format import Manifest, find_checkpoint
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.inspect import inspect_model
from megatron_slm.convert.verify import verify
from megatron_slm.errors import CheckpointError, WeightsError
from tests.convert.tokenizers import save_tokenizer
from tests.support.commands import run_here
from tests.support.families import save_family
from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

FROM_SCRATCH = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "init_method_std")
)


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    return run_here("convert", *words)


def test_a_trained_run_exports_what_it_trained_and_says_where_it_comes_from(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    base = save_family("qwen3", tmp_path / "base", dtype=torch.bfloat16)
    (base / "LICENSE").write_text("yours")
    reference = save_family("mistral", tmp_path / "reference", seed=1)
    changes = {
        "init_from": base,
        "reference_load": reference,
        "objective": "slm",
        "slm_keep_ratio": 0.5,
        **FROM_SCRATCH,
    }
    layout = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    run_world(
        train_and_report, 4, run_flags(corpus, tmp_path / "run", train_iters=2, save_interval=2, **changes, **layout)
    )
    resumed = {"load": tmp_path / "run" / "checkpoints", "train_iters": 3, "save_interval": 3}
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "run", **{**changes, "init_from": None, **resumed}))
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    manifest = Manifest.read(checkpoint)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert manifest.step == 3
    assert manifest.state.tokens_seen == sum(line["valid_tokens"] for line in lines) > 0
    assert manifest.state.tokens_kept == sum(line["kept_tokens"] for line in lines) > 0

    done = export_checkpoint(str(tmp_path / "run" / "checkpoints"), str(tmp_path / "hf"))
    assert done.report is not None
    assert done.report.max_nats <= 1e-5
    config = AutoConfig.from_pretrained(done.folder)
    assert (config.model_type, config.dtype) == ("qwen3", torch.float32)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, done.folder))
    assert {key for key in before if before[key] != after[key]} == {"dtype"}
    assert (done.folder / "LICENSE").read_text() == "yours"
    state, source = load_file(done.folder / "model.safetensors"), CheckpointSource(checkpoint)
    assert all(torch.equal(state[name], source.whole(name)) for name in state)
    card = (done.folder / "README.md").read_text()
    story = json.loads((checkpoint / "origin" / "origin.json").read_text())
    for expected in (
        f"tokens seen | {manifest.state.tokens_seen:,}", f"{manifest.state.tokens_kept:,} (", "keep ratio | 0.5",
        str(corpus), str(base), str(reference), "Qwen3ForCausalLM", "slm-keep-ratio: 0.5", manifest.sample_order,
        story["data"][0]["sha256"], story["references"][0]["sha256"], story["base"]["sha256"],
    ):  # fmt: skip
        assert str(expected) in card, expected

    half = export_checkpoint(str(checkpoint), str(tmp_path / "half"), dtype="bfloat16")
    assert half.report is not None
    assert half.report.rounded_to == "bfloat16"
    assert half.report.max_nats <= 1e-5


def test_a_run_from_scratch_has_a_card_too(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(
        corpus, tmp_path / "run", save_interval=1, train_iters=1, no_untie_embeddings_and_output_weights=True
    )
    run_world(train_and_report, 1, values)
    out = export_checkpoint(str(tmp_path / "run" / "checkpoints"), str(tmp_path / "hf"), verifies=False)
    assert (out.report, out.not_verified) == (None, "--no-verify")
    assert AutoModelForCausalLM.from_pretrained(out.folder).config.tie_word_embeddings
    card = (out.folder / "README.md").read_text()
    assert "random weights" in card
    assert "Trained on every token" in card


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    import_folder(str(hf), str(tmp_path / "ours"))
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out"), shard_bytes=20_000).folder
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size <= 20_000 + 2_000 for path in shards)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    again = import_folder(str(out), str(tmp_path / "again"))
    assert len(list(again.glob("weights_*.safetensors"))) == len(shards)
    assert all(torch.equal(CheckpointSource(again).whole(name), value) for name, value in tensors.items())


def test_tokenizers_travel_byte_for_byte(tmp_path: Path) -> None:
    hf = save_tokenizer(save_hf_llama(tmp_path / "hf"))
    import_folder(str(hf), str(tmp_path / "ours"))
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out")).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("w3 w5")["input_ids"] == [3, 5]


def test_the_commands(tmp_path: Path) -> None:
    hf = save_tokenizer(save_hf_llama(tmp_path / "hf"))
    done = tool("import", "--hf", hf, "--output", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    done = tool("export", "--load", tmp_path / "ours", "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "max |Δ log-prob| = " in done.stdout
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(200)))
    done = tool("verify", "--hf", tmp_path / "out", "--load", tmp_path / "ours", "--text-file", tmp_path / "text.txt",
                "--json", tmp_path / "report.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rounded to bfloat16" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(row) for row in report["delta_nats"]] == [64, 64, 64]
    assert report["max_nats"] == max(map(max, report["delta_nats"]))
    for path in (hf, tmp_path / "ours"):
        done = tool("inspect", path, "--json")
        found = json.loads(done.stdout)
        assert found["family"] == "llama"
        assert found["dtypes"] == {"float32": 30}
        assert found["architecture"]["num_layers"] == 3
    assert "num_query_groups" in tool("inspect", tmp_path / "ours").stdout
    assert inspect_model(str(tmp_path / "ours"))["tokens_seen"] == 0

    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    done = tool("verify", "--hf", hf, "--load", tmp_path / "ours")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("max |Δ| = ")
    assert "differ by more than" in done.stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = tool("export", "--load", tmp_path, "--output", "x")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: --load")]
    assert "Traceback" not in done.stderr


def test_folders_that_are_taken(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(WeightsError, match=r"--output is .*: must be a new or empty folder"):
        import_folder(str(hf), str(tmp_path / "taken"))
    checkpoint = import_folder(str(hf), str(tmp_path / "ours"))
    with pytest.raises(WeightsError, match=r"--output.*--overwrite"):
        export_checkpoint(str(checkpoint), str(tmp_path / "taken"))
    with pytest.raises(WeightsError, match=r"must be a Hugging Face folder .* to be replaced by --overwrite"):
        export_checkpoint(str(checkpoint), str(tmp_path / "taken"), overwrite=True)
    assert (tmp_path / "taken" / "file").exists()
    for inside in (checkpoint, checkpoint.parent):
        with pytest.raises(WeightsError, match="must not contain the checkpoint"):
            export_checkpoint(str(checkpoint), str(inside), overwrite=True)
    with pytest.raises(WeightsError, match="--overwrite"):
        export_checkpoint(str(checkpoint), str(hf))
    (hf / "stale").touch()
    export_checkpoint(str(checkpoint), str(hf), overwrite=True)
    assert not (hf / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours", "taken"], "nothing is left over"
    (tmp_path / "killed" / ".step_00000000.tmp").mkdir(parents=True)
    import_folder(str(hf), str(tmp_path / "killed"))
    with pytest.raises(CheckpointError, match=r"--load is .*: must be a checkpoint"):
        export_checkpoint(str(hf), str(tmp_path / "x"))


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    checkpoint = import_folder(str(hf), str(tmp_path / "ours"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_slm.checkpoint.tensor_file.os.fsync", full)
    with pytest.raises(WeightsError, match=r"model.safetensors.*No space left"):
        export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(WeightsError, match=r"No space left on device: .*weights_00000"):
        import_folder(str(hf), str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "other").iterdir())


def test_an_export_that_does_not_agree_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = import_folder(str(save_hf_llama(tmp_path / "hf")), str(tmp_path / "ours"))
    real = CheckpointSource.rows

    def wrong(self: CheckpointSource, name: str, start: int, stop: int) -> torch.Tensor:
        return (
            real(self, name, start, stop).flip(0)
            if name.endswith("layers.1.self_attn.q_proj.weight")
            else real(self, name, start, stop)
        )

    monkeypatch.setattr(CheckpointSource, "rows", wrong)
    with pytest.raises(
        WeightsError, match=r"max .Δ log-prob.* is \d.*: must be at most 0.0001 nats; nothing was written"
    ):
        export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("megatron_slm.convert.export.memory_shortage", lambda *_: "needs 9 GiB of memory")
    done = export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert (done.report, done.not_verified) == (None, "needs 9 GiB of memory")


def test_verify_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf")
    import_folder(str(hf), str(tmp_path / "ours"))
    other = save_hf_llama(tmp_path / "other", vocab_size=50)
    with pytest.raises(WeightsError, match="--load: vocab_size is 97: must equal 50"):
        verify(str(other), str(tmp_path / "ours"))
    (tmp_path / "text.txt").write_text("some words")
    with pytest.raises(WeightsError, match=r"--hf is .*: must have a tokenizer .* required by --text-file"):
        verify(str(hf), None, str(tmp_path / "text.txt"))
    with pytest.raises(WeightsError, match=r"--text-file is .*: must be readable"):
        verify(str(hf), None, str(tmp_path / "none.txt"))
    with pytest.raises(WeightsError, match="--tokens"):
        verify(str(hf), num_tokens=0)
    with pytest.raises(WeightsError, match="--hf"):
        verify(str(tmp_path / "ours"))
