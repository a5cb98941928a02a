"""Bad input ends the run before the first step, on every rank, with one line that names field, rule and fix."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command
from tests.support.world import WorldError, reported_error, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    save_hf_llama(path / "small_vocabulary", vocab_size=50)
    save_hf_llama(path / "five_heads", hidden_size=30, num_attention_heads=5, num_key_value_heads=5)
    _gpt2(path / "gpt2")
    for name in ("no_idx", "cut_idx", "cut_bin"):
        write_corpus(path / name)
    (path / "no_idx.idx").unlink()
    (path / "cut_idx.idx").write_bytes((path / "cut_idx.idx").read_bytes()[:-7])
    (path / "cut_bin.bin").write_bytes((path / "cut_bin.bin").read_bytes()[:-8])
    with IndexedCorpusWriter(path / "large_id", np.uint16) as writer:
        writer.add_document(np.arange(60_000, 60_100))
    (path / "empty.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))  # a sound index of nothing
    (path / "empty.bin").touch()
    (path / "bad.json").write_text('{"train_batch_size": 3, "zero_optimization": {"stage": 1}}')
    (path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    save_hf_llama(path / "too_few_layers")
    raw = json.loads((path / "too_few_layers" / "config.json").read_text())
    (path / "too_few_layers" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 5}))
    (path / "file").touch()
    (path / "half").mkdir()
    (path / "half" / ".step_00000002.tmp").mkdir()
    return path


def _gpt2(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))


SLM = {"objective": "slm", "reference_load": "{folder}/reference"}
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "unknown flag": (2, {"micro_batchsize": 2}, r"did you mean --micro-batch-size\?"),
    "heads not divisible": (2, {"num_attention_heads": 5, "hidden_size": 40, "num_query_groups": 5, "tensor_model_parallel_size": 2}, "model: number of attention heads is 5"),
    "reference heads not divisible": (2, {**SLM, "reference_load": "{folder}/five_heads", "tensor_model_parallel_size": 2}, "reference: "),
    "fewer layers than stages": (2, {"num_layers": 1, "pipeline_model_parallel_size": 2}, "must not exceed the number of layers"),
    "world not divisible": (2, {"tensor_model_parallel_size": 4}, "world size is 2"),
    "batch does not divide": (2, {"global_batch_size": 6}, "--global-batch-size is 6"),
    "missing idx": (2, {"data_path": "{folder}/no_idx"}, r"no_idx\.idx"),
    "truncated idx": (2, {"data_path": "{folder}/cut_idx"}, r"cut_idx\.idx"),
    "short bin": (2, {"data_path": "{folder}/cut_bin"}, r"cut_bin\.bin"),
    "no corpus": (2, {"data_path": "{folder}/nothing"}, "nothing"),
    "token id beyond the vocabulary": (2, {"data_path": "{folder}/large_id"}, "60099|60000"),
    "empty corpus": (2, {"data_path": "{folder}/empty"}, "empty"),
    "wrong architecture": (2, {"init_from": "{folder}/gpt2"}, "model_type is 'gpt2'"),
    "no such reference": (2, {**SLM, "reference_load": "{folder}/nowhere"}, "--reference-load"),
    "reference of another vocabulary": (2, {**SLM, "reference_load": "{folder}/small_vocabulary"}, "--reference-load: vocabulary"),
    "keep ratio too large": (1, {**SLM, "slm_keep_ratio": 1.5}, r"--slm-keep-ratio is 1.5: must be in \(0, 1\]"),
    "keep ratio zero": (1, {**SLM, "slm_keep_ratio": 0}, "--slm-keep-ratio"),
    "no reference": (1, {"objective": "slm"}, "--reference-load"),
    "reference without selection": (1, {"reference_load": "{folder}/reference"}, "--reference-load"),
    "unknown score": (2, {**SLM, "slm_score": "exces"}, r"--slm-score is 'exces'.*did you mean excess\?"),
    "protected id beyond the vocabulary": (1, {**SLM, "slm_never_keep": [3, 97]}, "--slm-never-keep is 97: .*below 97"),
    "threshold missing": (2, {**SLM, "slm_policy": "threshold"}, "--slm-threshold is missing"),
    "zero 2 with stages": (2, {"pipeline_model_parallel_size": 2, "deepspeed_config": "ds_configs/zero2_bf16.json"}, "zero_optimization.stage is 2"),
    "zero 0": (1, {"deepspeed_config": "{folder}/zero0.json"}, "zero_optimization.stage is 0"),
    "contradicting deepspeed json": (2, {"deepspeed_config": "{folder}/bad.json"}, "train_batch_size is 3"),
    "nothing to resume": (2, {"load": "{folder}/half"}, "contain a complete checkpoint"),
    "no time to wait": (1, {"distributed_timeout_minutes": 0}, "--distributed-timeout-minutes is 0"),
    "warm-up of less than nothing": (1, {"reference_schedule_warmup_steps": -1}, "--reference-schedule-warmup-steps is -1"),
    "no such schedule": (1, {"reference_schedule": "sideways"}, "--reference-schedule is 'sideways'"),
    "wrong type": (1, {"train_iters": "many"}, "--train-iters is 'many'"),
    "sequence does not divide": (2, {"seq_length": 15, "tensor_model_parallel_size": 2, "sequence_parallel": True}, "--seq-length is 15"),
    "sequence parallel alone": (1, {"sequence_parallel": True}, "--sequence-parallel"),
    "weights that do not fit": (2, {**SLM, "reference_load": "{folder}/too_few_layers"}, "model.layers.3"),
    "rope without its numbers": (1, {"rope_scaling": '{{"rope_type": "llama3"}}'}, "--rope-scaling.factor"),
    "run folder is a file": (2, {"run_dir": "{folder}/file"}, "--run-dir"),
    "checkpoint folder is a file": (2, {"save": "{folder}/file"}, "--save"),
    "no tokenizer": (1, {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}, "--tokenizer-model"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_ends_every_rank(name: str, folder: Path, tmp_path: Path) -> None:
    world_size, changes, pattern = CASES[name]
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    corpus, run_dir = changes.pop("data_path", folder / "corpus"), changes.pop("run_dir", tmp_path / "run")
    values = run_flags(corpus, run_dir, **changes)
    if "init-from" in values:
        for architecture in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"):
            values.pop(architecture)
    with pytest.raises(WorldError) as failed:
        run_world(command, world_size, flags(values))
    assert failed.value.codes == [2] * world_size
    error = reported_error(failed.value)
    assert re.search(pattern, error), error
    assert "Fix: " in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_error_of_one_rank_ends_all(folder: Path, tmp_path: Path) -> None:
    """Ranks share the comparison of checksums; the others stop with the one that finds damage."""
    values = run_flags(folder / "corpus", tmp_path / "run", train_iters=2, save_interval=2)
    run_world(command_ok, 1, flags(values))
    weights = next((tmp_path / "run" / "checkpoints" / "step_00000002").glob("weights_*"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    again = {**values, "train-iters": 4, "load": tmp_path / "run" / "checkpoints"}
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags(again))
    assert failed.value.codes == [2, 2]
    assert "match its checksum in manifest.json" in reported_error(failed.value)


def command_ok(argv: list[str]) -> None:
    from megatron_slm.cli.pretrain import main

    assert main(argv) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "bf16": True},
        {"deepspeed_config": "ds_configs/zero2_bf16.json"},
        {"deepspeed_config": "ds_configs/zero3_bf16.json", "bf16": True},
    ],
    ids=["stages", "stages bf16", "zero 2", "zero 3 bf16"],
)
def test_steps_that_are_never_finite_end_the_run(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "corpus", tmp_path / "run", train_iters=9, max_skipped_steps=3, eval_interval=2,
        valid_data_path=f"held={folder}/corpus", **changes,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command_with_broken_weights, 2, flags(values))
    assert "3 up to step 3 (3 x nonfinite-loss)" in reported_error(failed.value)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line.get("event") == "eval"] == [None]
    lines = [line for line in lines if "event" not in line]
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3]
    assert {line["loss"] for line in lines} == {None}
    assert {line["grad_norm"] for line in lines} == {None}


def command_with_broken_weights(argv: list[str]) -> int:
    from megatron_slm.checkpoint import weights

    real = weights.normal_
    weights.normal_ = lambda *args, **kwargs: real(*args, **kwargs) * float("nan")
    return command(argv)
