"""Bad input ends the run before the first step, on every rank, with one line that names field, rule and fix."""

from __future__ import annotations

import json
import re
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.errors import SlmError
from tests.checkpoint.test_format import write as write_checkpoint
from tests.data.texts import training_texts
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
    (path / "misspelled.json").write_text('{"zero_optimization": {"stage": 1, "overlap_com": true}}')
    for step in (1, 3):
        write_checkpoint(path / "later", step)
    _unigram(path / "unigram.model")
    (path / "half").mkdir()
    (path / "half" / ".step_00000002.tmp").mkdir()
    return path


def _unigram(path: Path) -> None:
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_texts()), model_writer=file, model_type="unigram", vocab_size=400,
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip


def _gpt2(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))


WORLD_SIZE = 2
SLM = {"objective": "slm", "reference_load": "{folder}/reference"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown flag": ({"micro_batchsize": 2}, r"did you mean --micro-batch-size\?"),
    "heads not divisible": ({"num_attention_heads": 5, "hidden_size": 40, "num_query_groups": 5, "tensor_model_parallel_size": 2}, "model: number of attention heads is 5"),
    "reference heads not divisible": ({**SLM, "reference_load": "{folder}/five_heads", "tensor_model_parallel_size": 2}, "reference: "),
    "fewer layers than stages": ({"num_layers": 1, "pipeline_model_parallel_size": 2}, "must not exceed the number of layers"),
    "world not divisible": ({"tensor_model_parallel_size": 4}, "world size is 2"),
    "batch does not divide": ({"global_batch_size": 6}, "--global-batch-size is 6"),
    "missing idx": ({"data_path": "{folder}/no_idx"}, r"no_idx\.idx"),
    "truncated idx": ({"data_path": "{folder}/cut_idx"}, r"cut_idx\.idx"),
    "short bin": ({"data_path": "{folder}/cut_bin"}, r"cut_bin\.bin"),
    "no corpus": ({"data_path": "{folder}/nothing"}, "nothing"),
    "token id beyond the vocabulary": ({"data_path": "{folder}/large_id"}, "60099|60000"),
    "empty corpus": ({"data_path": "{folder}/empty"}, "empty"),
    "wrong architecture": ({"init_from": "{folder}/gpt2"}, "model_type is 'gpt2'"),
    "no such reference": ({**SLM, "reference_load": "{folder}/nowhere"}, "--reference-load"),
    "reference of another vocabulary": ({**SLM, "reference_load": "{folder}/small_vocabulary"}, "--reference-load: vocabulary"),
    "keep ratio too large": ({**SLM, "slm_keep_ratio": 1.5}, r"--slm-keep-ratio is 1.5: must be in \(0, 1\]"),
    "keep ratio zero": ({**SLM, "slm_keep_ratio": 0}, "--slm-keep-ratio"),
    "no reference": ({"objective": "slm"}, "--reference-load"),
    "reference without selection": ({"reference_load": "{folder}/reference"}, "--reference-load"),
    "unknown score": ({**SLM, "slm_score": "exces"}, r"--slm-score is 'exces'.*did you mean excess\?"),
    "protected id beyond the vocabulary": ({**SLM, "slm_never_keep": [3, 97]}, "--slm-never-keep is 97: .*below 97"),
    "threshold missing": ({**SLM, "slm_policy": "threshold"}, "--slm-threshold is missing"),
    "zero 2 with stages": ({"pipeline_model_parallel_size": 2, "deepspeed_config": "ds_configs/zero2_bf16.json"}, "zero_optimization.stage is 2"),
    "zero 0": ({"deepspeed_config": "{folder}/zero0.json"}, "zero_optimization.stage is 0"),
    "contradicting deepspeed json": ({"deepspeed_config": "{folder}/bad.json"}, "train_batch_size is 3"),
    "nothing to resume": ({"load": "{folder}/half"}, "contain a complete checkpoint"),
    "no time to wait": ({"distributed_timeout_minutes": 0}, "--distributed-timeout-minutes is 0"),
    "warm-up of less than nothing": ({"reference_schedule_warmup_steps": -1}, "--reference-schedule-warmup-steps is -1"),
    "no such schedule": ({"reference_schedule": "sideways"}, "--reference-schedule is 'sideways'"),
    "wrong type": ({"train_iters": "many"}, "--train-iters is 'many'"),
    "sequence does not divide": ({"seq_length": 15, "tensor_model_parallel_size": 2, "sequence_parallel": True}, "--seq-length is 15"),
    "sequence parallel alone": ({"sequence_parallel": True}, "--sequence-parallel"),
    "weights that do not fit": ({**SLM, "reference_load": "{folder}/too_few_layers"}, "model.layers.3"),
    "rope without its numbers": ({"rope_scaling": '{{"rope_type": "llama3"}}'}, "--rope-scaling.factor"),
    "run folder is a file": ({"run_dir": "{folder}/file"}, "--run-dir"),
    "checkpoint folder is a file": ({"save": "{folder}/file"}, "--save"),
    "no tokenizer": ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}, "--tokenizer-model"),
    "checkpoint of a later step": ({"save": "{folder}/later"}, r"but has step_00000003\..*resume from it with --load"),
    "checkpoint of another architecture": ({"load": "{folder}/later/step_00000001"}, "must match the checkpoint"),
    "save folder below a file": ({"save": "{folder}/file/saved"}, "--save"),
    "run folder below a file": ({"run_dir": "{folder}/file/run"}, "--run-dir"),
    "profiled rank": ({"profile_step_start": 1, "profile_ranks": [2]}, r"--profile-ranks is \[2\]"),
    "best of a set that is not there": ({"save_interval": 1, "eval_interval": 1, "keep_last": 1, "keep_best": "held"}, "--keep-best is 'held'"),
    "misspelled ZeRO field": ({"deepspeed_config": "{folder}/misspelled.json"}, "zero_optimization.overlap_com is True: must be accepted by DeepSpeed's ZeRO"),
    "attention of a GPU": ({"attention_backend": "flash"}, "--attention-backend is 'flash'"),
    "tokenizer without a Hugging Face form": ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "{folder}/unigram.model", "vocab_size": None}, "exact Hugging Face form"),
    "no such texts": ({"probe_file": "{folder}/nowhere.txt"}, "--probe-file"),
    "unknown scope": ({**SLM, "slm_scope": "document"}, "--slm-scope is 'document'"),
}  # fmt: skip


def command_line(name: str, folder: Path, run: str = "run") -> list[str]:
    """The flags of a case."""
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in CASES[name][0].items()}
    corpus, run_dir = changes.pop("data_path", folder / "corpus"), changes.pop("run_dir", folder / run)
    values = run_flags(corpus, run_dir, **changes)
    if "init-from" in values:
        for architecture in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"):
            values.pop(architecture)
    return flags(values)


def errors_of_runs(command_lines: dict[str, list[str]]) -> dict[str, str | None]:
    """Prepare every run in one world; the errors, None where there was none."""
    from megatron_slm.flags.load import parse
    from megatron_slm.training.pretrain import prepare

    found: dict[str, str | None] = {}
    for name, argv in command_lines.items():
        try:
            prepare(parse(argv)[0])
            found[name] = None
        except SlmError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def errors_by_rank(folder: Path) -> list[dict[str, str | None]]:
    """The errors of runs on two ranks that are configured as in `CASES`."""
    return run_world(errors_of_runs, WORLD_SIZE, {name: command_line(name, folder) for name in CASES})


@pytest.mark.parametrize("name", CASES)
def test_a_run_and_its_dry_run_refuse_alike(
    name: str,
    errors_by_rank: list[dict[str, str | None]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, pattern = CASES[name]
    errors = {errors[name] for errors in errors_by_rank}
    assert len(errors) == 1, "one error on all ranks"
    (error,) = errors
    assert error is not None
    assert re.search(pattern, error), error
    assert "Fix: " in error
    monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZE))
    capsys.readouterr()
    assert main([*command_line(name, folder, "dry"), "--dry-run"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")] == [f"error: {error}"]
    assert not (folder / "dry").exists()
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "num_ranks"), [("unknown flag", 2), ("missing idx", 4), ("run folder is a file", 2)])
def test_the_ranks_print_one_error(name: str, num_ranks: int, folder: Path) -> None:
    with pytest.raises(WorldError) as failed:
        run_world(command, num_ranks, command_line(name, folder))
    assert failed.value.codes == [2] * num_ranks
    line = reported_error(failed.value)
    assert re.search(CASES[name][1], line)
    assert line.endswith(f", host {socket.gethostname()})")
    assert re.search(r" \(rank [0-3], host ", line), "whose error it is"


def test_sequences_beyond_a_models_positions_are_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**run_flags(folder / "corpus", folder / "run", objective="slm"), "reference-load": folder / "reference"}
    expected = "--seq-length is 65: longer than the 64 positions of the reference (max_position_embeddings)"
    for length in (64, 65):
        assert main([*flags({**values, "seq-length": length}), "--dry-run"]) == 0
        assert (expected in capsys.readouterr().err) == (length == 65)


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

    real = weights.normal_range
    weights.normal_range = lambda *args, **kwargs: real(*args, **kwargs) * float("nan")
    return command(argv)
