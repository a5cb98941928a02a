"""More tensor-parallel ranks than key/value heads: the same training, weights and checkpoints as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.errors import LayoutError
from megatron_slm.flags.load import parse
from megatron_slm.planning.layouts import candidate_layouts, configured_layout
from megatron_slm.planning.memory import model_parameters
from megatron_slm.planning.planned_run import plan_run
from megatron_slm.run.layout import check_layout, run_topology
from tests.parity.test_layout_change import assert_same_state, save_what_was_loaded
from tests.parity.test_resume import metrics
from tests.support.cases import some_by_default
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world

SIZES = {
    "num_query_groups": 2,
    "qk_layernorm": True,
    "adam_eps": 1e-3,  # Adam would make whole steps of what rounding makes of zeros
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, and what is not as in one process
    "tp4": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "tp4-zero3": (4, {"tensor_model_parallel_size": 4, "deepspeed_config": zero_config(3)}),
    "tp4-dp2": (8, {"tensor_model_parallel_size": 4, "deepspeed_config": zero_config(1)}),
    "tp4-one-head": (4, {"tensor_model_parallel_size": 4, "num_query_groups": 1}),
    "tp8-pp2": (
        16,
        {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2, "num_attention_heads": 8, "sequence_parallel": True},
    ),
}  # fmt: skip
SHAPE = ("num_query_groups", "num_attention_heads")


def train(folder: Path, world: int, reference: Path, **changes: Any) -> tuple[dict[str, Any], Path]:
    run_dir = folder / f"run{world}"
    corpus = folder / "corpus"
    values = run_flags(
        corpus, run_dir, objective="slm", reference_load=reference, save=run_dir / "checkpoints", **{**SIZES, **changes}
    )
    reports = run_world(train_and_report, world, values, timeout_seconds=240)
    return reports[0], run_dir


@pytest.mark.parametrize("name", some_by_default(CASES, "tp4"))
def test_training_and_weights_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    world, changes = CASES[name]
    shape = {key: value for key, value in changes.items() if key in SHAPE}
    write_corpus(tmp_path / "corpus")
    reference = save_hf_llama(
        tmp_path / "reference",
        hidden_size=32,
        head_dim=8,  # every rank of eight that share a head has a slice of it
        num_attention_heads=shape.get("num_attention_heads", 4),
        num_key_value_heads=3 - shape.get("num_query_groups", 2),
    )
    one, one_dir = train(tmp_path, 1, reference, **shape)
    many, many_dir = train(tmp_path, world, reference, **changes)
    for column in ("loss", "loss_all", "reference_loss", "grad_norm", "kept_tokens"):
        found, wanted = ([line[column] for line in metrics(d) if "event" not in line] for d in (many_dir, one_dir))
        assert found == pytest.approx(wanted, rel=1e-5), column
        assert len(found) == 5
    kept = dict(one["kept"])
    assert all(kept[tokens] == rows for tokens, rows in dict(many["kept"]).items())
    sources = [CheckpointSource(find_checkpoint(folder / "checkpoints")) for folder in (one_dir, many_dir)]
    assert sources[0].shapes() == sources[1].shapes()
    for tensor in sources[0].shapes():
        for quantity in ("weight", "exp_avg", "exp_avg_sq"):
            a, b = (source.whole(tensor, quantity) for source in sources)
            assert torch.dist(a, b) <= 1e-4 * a.norm(), (tensor, quantity)  # Adam turns rounding of zeros into steps
    _check_export(tmp_path, many_dir)
    if name == "tp4-dp2":
        _check_resumes(tmp_path, many_dir)


def _check_export(folder: Path, saved: Path) -> None:
    export_checkpoint(str(saved / "checkpoints"), str(folder / "hf"), verifies=False)
    exported = load_file(folder / "hf" / "model.safetensors")
    source = CheckpointSource(find_checkpoint(saved / "checkpoints"))
    assert all(torch.equal(tensor.float(), source.whole(name)) for name, tensor in exported.items())
    assert exported.keys() == source.shapes().keys()


def _check_resumes(folder: Path, saved: Path) -> None:
    for size in (1, 2):
        values = run_flags(
            folder / "corpus", folder / f"resumed{size}", load=saved / "checkpoints", train_iters=6,
            tensor_model_parallel_size=size, **SIZES,
        )  # fmt: skip
        run_world(save_what_was_loaded, size, values)
        assert_same_state(saved / "checkpoints", folder / f"resumed{size}" / "at_once")


def planned(folder: Path, **changes: Any) -> Any:
    return plan_run(parse(flags(run_flags(folder / "corpus", folder / "run", **changes)))[0])


def test_the_planner_counts_every_weight_once(tmp_path: Path) -> None:
    run = planned(tmp_path, tensor_model_parallel_size=4)
    two = planned(tmp_path, tensor_model_parallel_size=2)
    norms = run.architecture.hidden_size * (2 * run.architecture.num_layers + 1)
    (four,), (half,) = (model_parameters(r, configured_layout(r, n)) for r, n in ((run, 4), (two, 2)))
    assert 2 * (four.total - norms) == half.total - norms
    assert {layout.tensor for layout in candidate_layouts(run, 8, max_tensor=8)} == {1, 2, 4}


def test_groups_that_fit_neither_way_are_refused(tmp_path: Path) -> None:
    config = planned(
        tmp_path, tensor_model_parallel_size=4, num_attention_heads=12, num_query_groups=6, hidden_size=48
    ).config
    arch = planned(tmp_path, num_attention_heads=12, num_query_groups=6, hidden_size=48).architecture
    with pytest.raises(LayoutError, match=r"model: number of query groups is 6: must be divisible by .* \(4\), or div"):
        check_layout(arch, config, run_topology(config, 4), what="model")
