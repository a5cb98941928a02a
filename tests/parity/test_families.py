"""Every family trains over tensor-parallel ranks and over stages as in one process, with a reference of its kind.

What was trained so goes out again, and transformers computes the same from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.verify import verify
from megatron_slm.parallel.layers import ParallelLayers
from tests.support.cases import some_by_default
from tests.support.families import logits_of, our_logits, save_family
from tests.support.runs import run_flags, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

NAMES = ["llama 3", "smollm2", "mistral", "qwen2.5 with a window", "qwen3 with everything", "smollm3", "granite 3",
         "phi-4-mini with longrope", "glm-4", "olmo 3", "gemma 2", "gemma 3"]  # fmt: skip
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
FROM_SCRATCH = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                "init_method_std")  # fmt: skip
TRAINED_AND_EXPORTED = ["ministral", "smollm3", "granite 3", "phi-3", "phi-4-mini with longrope", "glm-4", "olmo 2",
                        "olmo 3", "gemma 2", "gemma 3"]  # fmt: skip
COLUMNS = ("loss", "loss_all", "loss_unselected", "reference_loss", "excess_selected", "kept_tokens", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def train(name: str, folder: Path, run: str, **changes: Any) -> tuple[dict[str, list[float]], dict[bytes, Any]]:
    """Columns of a run's metrics, and which tokens it kept by micro-batch, in order."""
    folder = folder / name.replace(" ", "-")
    if run == "single" and (folder / run).exists():
        return read(folder / run, [])
    corpus, init, reference = folder / "corpus", folder / "init", folder / "reference"
    if not init.exists():
        write_corpus(corpus)
        save_family(name, init)
        save_family(name, reference, seed=1)
    described = dict.fromkeys(FROM_SCRATCH)
    values = run_flags(
        corpus, folder / run, init_from=init, reference_load=reference, objective="slm", train_iters=3, lr=1e-4,
        **{**described, **changes},
    )  # fmt: skip
    size = changes.get("tensor_model_parallel_size", 1) * changes.get("pipeline_model_parallel_size", 1)
    reports = run_world(train_and_report, size * changes.get("context_parallel_size", 1), values)
    return read(folder / run, reports)


def read(run_dir: Path, reports: list[dict[str, Any]]) -> tuple[dict[str, list[float]], dict[bytes, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept: dict[bytes, Any] = {}
    for report in reports:
        seen: set[bytes] = set()
        for tokens, rows in report["kept"]:
            if tokens not in seen:
                seen.add(tokens)
                assert kept.setdefault(tokens, rows) == rows, "ranks kept different tokens"
    return {column: [line[column] for line in lines] for column in COLUMNS}, kept


@pytest.mark.parametrize("name", some_by_default(NAMES, "qwen2.5 with a window", "qwen3 with everything"))
def test_two_tensor_parallel_ranks_and_two_stages(name: str, folder: Path) -> None:
    single, kept = train(name, folder, "single")
    first_step = list(kept)[:4]
    for run, layout in (("tensor", TENSOR), ("stages", PIPELINE)):
        columns, its_kept = train(name, folder, run, **layout)
        for column in COLUMNS:
            assert columns[column] == pytest.approx(single[column], rel=1e-5, abs=1e-6), (run, column)
        assert all(its_kept[batch] == kept[batch] for batch in first_step)  # later a rounding may turn a near tie


@pytest.mark.parametrize("name", some_by_default(TRAINED_AND_EXPORTED, "gemma 3"))
def test_trained_at_tensor_and_pipeline_parallelism_and_out_again(name: str, folder: Path, tmp_path: Path) -> None:
    single, kept = train(name, folder, "single")
    columns, its_kept = train(name, folder, "both", save_interval=3, **TENSOR, **PIPELINE)
    for column in COLUMNS:
        assert columns[column] == pytest.approx(single[column], rel=1e-5, abs=1e-6), column
    assert all(its_kept[batch] == kept[batch] for batch in list(kept)[:4])
    run = folder / name.replace(" ", "-")
    checkpoint = find_checkpoint(run / "both" / "checkpoints")
    done = export_checkpoint(str(checkpoint), str(tmp_path / "hf"))
    assert done.report is not None
    assert done.report.max_nats <= 1e-5
    theirs = logits_of(done.folder)
    assert (our_logits(checkpoint) - theirs).abs().max() <= 1e-5
    assert (theirs - logits_of(run / "init")).abs().max() > 1e-3, "it was trained"
    assert verify(str(done.folder), str(checkpoint), num_tokens=64).max_nats <= 1e-5
    before, after = (json.loads((one / "config.json").read_text()) for one in (run / "init", done.folder))
    assert {key for key in before if before[key] != after[key]} <= {"dtype"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi-4-mini with longrope", "gemma 2", "olmo 3"])
def test_two_context_parallel_ranks(name: str, folder: Path) -> None:
    """Scalings that depend on the sequence's length, soft caps and windows, with half of each sequence on a rank."""
    single, _ = train(name, folder / "long", "single", seq_length=32)
    columns, _ = train(name, folder / "long", "context", seq_length=32, context_parallel_size=2)
    for column in COLUMNS:
        assert columns[column] == pytest.approx(single[column], rel=1e-5, abs=1e-6), column


def test_norms_of_heads_under_sequence_parallelism(folder: Path) -> None:
    single, _ = train("qwen3 with everything", folder, "single")
    columns, _ = train("qwen3 with everything", folder, "sequence", sequence_parallel=True, **TENSOR)
    for column in COLUMNS:
        assert columns[column] == pytest.approx(single[column], rel=1e-5, abs=1e-6), column


real_train_and_report = train_and_report


def train_with_partial_gradients(values: dict[str, Any]) -> dict[str, Any]:
    ParallelLayers.on_head_share = ParallelLayers.on_sequence_shard  # type: ignore[method-assign]
    return real_train_and_report(values)


def test_a_gradient_of_one_ranks_heads_alone_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single, _ = train("qwen3 with everything", folder, "single")
    monkeypatch.setitem(globals(), "train_and_report", train_with_partial_gradients)
    columns, _ = train("qwen3 with everything", folder, "tensor", **TENSOR)
    assert columns["loss"][0] == pytest.approx(single["loss"][0], rel=1e-5)
    assert columns["grad_norm"] != pytest.approx(single["grad_norm"], rel=1e-5)
