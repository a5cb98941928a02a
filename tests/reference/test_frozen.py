"""The reference is outside of everything that trains or is saved, and may have any depth and width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.flags.load import parse
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.run.plan import make_plan
from megatron_slm.training.build import build_run
from megatron_slm.training.loop import train
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.world import run_world


def trained_parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    groups = next(getattr(optimizer, name) for name in ("bf16_groups", "bit16_groups") if hasattr(optimizer, name))
    return [parameter for group in groups for parameter in group]


def inspect(values: dict[str, Any]) -> dict[str, Any]:
    init_distributed()
    config, _ = parse(flags(values))
    run = build_run(make_plan(config, torch.distributed.get_world_size()))
    engine: Any = run.trainer.engine
    reference = engine.context.reference
    before = {name: p.clone() for name, p in reference.named_parameters()}
    train(run)
    mine = {id(p) for p in reference.parameters()}
    return {
        "same": all(torch.equal(before[name], p) for name, p in reference.named_parameters()),
        "gradients": [p.grad is not None or p.requires_grad for p in reference.parameters()],
        "in_module": any(id(p) in mine for p in engine.module.parameters()),
        "in_engine": any(id(p) in mine for p in engine.parameters()),
        "in_optimizer": any(id(p) in mine for p in trained_parameters(engine.optimizer)),
        "training": reference.training,
        "count": len(mine),
        "numel": sum(p.numel() for p in engine.module.parameters()),
    }


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_reference_is_frozen_and_outside(tmp_path: Path, bf16: bool) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    changes = {"bf16": True} if bf16 else {}
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, pipeline_model_parallel_size=2,
        save_interval=5, **changes,
    )  # fmt: skip
    for report in run_world(inspect, 2, values):
        assert report["same"]
        assert report["count"] > 0
        assert not any(report["gradients"])
        for place in ("in_module", "in_engine", "in_optimizer", "training"):
            assert not report[place], place
    folder = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    shapes = CheckpointSource(folder).shapes()
    assert shapes["model.embed_tokens.weight"] == (97, 32)  # the model's width; the reference's is 24
    assert {name.split(".")[2] for name in shapes if ".layers." in name} == {"0", "1", "2", "3"}  # it has 3 layers


def losses_of(values: dict[str, Any]) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    config, _ = parse(flags(values))
    pretrain(config, observer=lambda batch, loss, reference, kept: seen.append(reference.numpy().copy()))
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 1},  # fewer layers than stages
        pytest.param({"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}, marks=pytest.mark.slow),
        {"num_hidden_layers": 5, "hidden_size": 48, "num_key_value_heads": 4},
        pytest.param({"num_hidden_layers": 3, "tie_word_embeddings": True}, marks=pytest.mark.slow),
    ],
    ids=["one layer", "half the width", "deeper and wider", "tied"],
)
def test_any_size_of_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference", **options)
    common = {"objective": "slm", "reference_load": reference, "train_iters": 2}
    run_world(losses_of, 1, run_flags(corpus, tmp_path / "single", **common))
    three = run_flags(corpus, tmp_path / "stages", **common, pipeline_model_parallel_size=3)
    cut = run_flags(
        corpus, tmp_path / "cut", **common, pipeline_model_parallel_size=2, tensor_model_parallel_size=2,
        sequence_parallel=True,
    )  # fmt: skip
    run_world(losses_of, 3, three)
    run_world(losses_of, 4, cut)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("single", "stages", "cut")
    ]
    for other in lines[1:]:
        for column in ("reference_loss", "loss", "kept_tokens"):
            assert [line[column] for line in other] == pytest.approx([line[column] for line in lines[0]], rel=1e-5)


def test_a_checkpoint_of_ours_is_a_reference_at_any_layout(tmp_path: Path) -> None:
    """As the three steps of the method go: train the reference, then use its checkpoints folder."""
    corpus = write_corpus(tmp_path / "corpus")
    trained = run_flags(corpus, tmp_path / "reference", save_interval=5, tensor_model_parallel_size=2)
    run_world(losses_of_clm, 2, trained)
    folder = tmp_path / "reference" / "checkpoints"
    exported = export_checkpoint(str(folder), str(tmp_path / "hf")).folder
    lines = []
    for name, reference, layout in (
        ("ours", folder, {"pipeline_model_parallel_size": 2}),
        ("theirs", exported, {}),
    ):
        values = run_flags(corpus, tmp_path / name, objective="slm", reference_load=reference, train_iters=2, **layout)
        run_world(losses_of, 2, values)
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert lines[0][0]["reference_loss"] == pytest.approx(lines[1][0]["reference_loss"], rel=1e-6)
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=1e-5)


def losses_of_clm(values: dict[str, Any]) -> None:
    pretrain(parse(flags(values))[0])


def test_reference_losses_are_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(corpus, tmp_path / "run", objective="slm", reference_load=reference, train_iters=1,
                       pipeline_model_parallel_size=2)  # fmt: skip
    seen = run_world(report_batches, 2, values)[1]
    model = LlamaForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    for tokens, labels, losses in seen:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none"
        )
        assert np.abs(losses - expected.numpy()).max() < 1e-5
    assert len(seen) == 4


def report_batches(values: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    seen = []
    config, _ = parse(flags(values))
    pretrain(
        config,
        observer=lambda batch, loss, reference, kept: seen.append(
            (batch.tokens_bs.numpy().copy(), batch.labels_bs.numpy().copy(), reference.numpy().copy())
        ),
    )
    return seen
