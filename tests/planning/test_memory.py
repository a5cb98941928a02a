"""Predicted memory against measured memory: bytes of tensors on every rank of small runs, by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.flags.load import parse
from megatron_slm.planning.estimates import estimate
from megatron_slm.planning.gpus import GPUS, Cluster
from megatron_slm.planning.layouts import configured_layout
from megatron_slm.planning.memory import StageMemory, stash_bytes
from megatron_slm.planning.planned_run import PlannedRun, plan_run
from tests.support.cases import some_by_default
from tests.support.memory import measure
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.world import run_world

TOLERANCE = 0.1
EXACT = 0.001
"""Of what is counted: some optimizers pad their partitions by a few elements."""
SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 320,
    "seq_length": 64,
    "global_batch_size": 8,
    "loss_head_variant": "recompute",
}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed_config": zero_config(stage)}


TIED = {"no_untie_embeddings_and_output_weights": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {  # pipeline, tensor, data
    "zero1-fp32": ("212", {}),
    "zero1-fp32-tied-odd": ("211", {**TIED, "num_layers": 3, "micro_batch_size": 1}),
    "zero1-bf16-4-stages": ("411", {"bf16": True}),
    "zero1-bf16-sequence-parallel": ("221", {"bf16": True, "sequence_parallel": True}),
    "zero1-bf16-tensor-parallel": ("121", {"bf16": True}),
    "zero1-bf16-recompute": ("211", {"bf16": True, "recompute_granularity": "full"}),
    "zero1-bf16-selective": ("221", {"bf16": True, "sequence_parallel": True, "recompute_granularity": "selective"}),
    "zero2-bf16-units": ("112", {"bf16": True, "recompute_granularity": "full", "recompute_num_layers": 3, **zero(2)}),
    "zero1-bf16-some-blocks": (
        "211",
        {
            "bf16": True,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
        },
    ),
    "zero1-bf16-sampled-rows": (
        "221",
        {"bf16": True, "sequence_parallel": True, "backward_rows": "sampled", "backward_row_share": 0.75},
    ),
    "zero1-bf16-context-parallel": ("112", {"bf16": True, "context_parallel_size": 2, "num_query_groups": 4}),
    "zero1-bf16-context-parallel-sampled-rows": (
        "112",
        {"bf16": True, "context_parallel_size": 2, "backward_rows": "sampled", "backward_row_share": 0.75},
    ),
    "zero2-bf16": ("112", {"bf16": True, **zero(2)}),
    "zero2-fp32-recompute": ("112", {"recompute_granularity": "full", **zero(2)}),
    "zero3-bf16": ("112", {"bf16": True, **zero(3)}),
    "zero1-bf16-dp2-pp2": ("212", {"bf16": True}),
    "zero3-offload": ("112", {"bf16": True, "deepspeed_config": "ds_configs/zero3_offload.json"}),
    "zero3-bf16-large-parameters": ("112", {"bf16": True, "hidden_size": 256, "ffn_hidden_size": 512, **zero(3)}),
    "zero3-fp32-tensor-parallel": ("122", {**zero(3)}),
}


def plan(values: dict[str, Any], layout: str) -> tuple[PlannedRun, list[StageMemory]]:
    run = plan_run(parse(flags(values))[0])
    pipeline, tensor, data = (int(x) for x in layout)
    world = pipeline * tensor * data
    cluster = Cluster(gpu=GPUS["h100"], num_nodes=1, gpus_per_node=world)
    return run, list(estimate(run, configured_layout(run, world), cluster).stages)


def layout_values(folder: Path, layout: str, **changes: Any) -> tuple[dict[str, Any], int]:
    pipeline, tensor, data = (int(x) for x in layout)
    sizes = {"pipeline_model_parallel_size": pipeline, "tensor_model_parallel_size": tensor}
    corpus = write_corpus(folder / "corpus", num_documents=200)
    return run_flags(corpus, folder / "run", **{**SIZES, **sizes, **changes}), pipeline * tensor * data


QUICK = (
    "zero1-fp32-tied-odd",
    "zero1-bf16-sequence-parallel",
    "zero2-fp32-recompute",
    "zero1-bf16-dp2-pp2",
    "zero3-offload",
)


@pytest.mark.parametrize("name", some_by_default(LAYOUTS, *QUICK))
def test_predicted_bytes_are_there(name: str, tmp_path: Path) -> None:
    layout, changes = LAYOUTS[name]
    values, world = layout_values(tmp_path, layout, **changes)
    stages = plan(values, layout)[1]
    for rank, found in enumerate(run_world(measure, world, values, timeout_seconds=280)):
        predicted = stages[rank * len(stages) // world]
        if predicted.host:  # all in one memory here
            assert predicted.gradients == predicted.optimizer == 0
            assert predicted.host == pytest.approx(found.pop("gradients") + found.pop("optimizer"), rel=EXACT)
        for part in ("parameters", "gradients", "optimizer", "buckets", "activations"):
            if part not in found:
                continue
            tolerance = TOLERANCE if part == "activations" else EXACT
            assert getattr(predicted, part) == pytest.approx(found[part], rel=tolerance), (part, rank)


def test_second_shares_inside_the_nodes_count(tmp_path: Path) -> None:
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 1000}
    config.write_text(json.dumps({"zero_optimization": {**zero, "zero_hpz_partition_size": 2}}))
    values, world = layout_values(tmp_path, "112", bf16=True, deepspeed_config=config)
    (stage,) = plan(values, "112")[1]
    for found in run_world(measure, world, values):
        assert stage.parameters == pytest.approx(found["parameters"], rel=EXACT)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_what_the_loss_keeps(bf16: bool, tmp_path: Path) -> None:
    values, world = layout_values(tmp_path, "111", loss_head_variant="stash", bf16=bf16 or None)
    run = plan(values, "111")[0]
    (found,) = run_world(measure, world, values)
    assert stash_bytes(run, configured_layout(run, 1)) == pytest.approx(found["stash"], rel=TOLERANCE)


def test_the_reference_is_held_whole_and_its_work_ahead_counts(tmp_path: Path) -> None:
    """No reference is in the measured runs: its weights are those of its own modules, its messages the schedule's."""
    reference = save_hf_llama(tmp_path / "reference", num_hidden_layers=2)
    slm = {"objective": "slm", "reference_load": reference}
    values, _ = layout_values(tmp_path, "211", **slm)
    run, stages = plan(values, "211")
    alone = plan(layout_values(tmp_path, "211")[0], "211")[1]
    assert sum(stage.reference for stage in stages) == pytest.approx(4 * run.reference.num_parameters, rel=TOLERANCE)
    assert [stage.reference for stage in alone] == [0, 0]
    assert stages[1].window > alone[1].window
    assert all(with_it.total > without.total for with_it, without in zip(stages, alone, strict=True))
    pair = {**slm, "slm_score": "reference-loss", "reference_base": save_hf_llama(tmp_path / "base", hidden_size=48)}
    two, of_two = plan(layout_values(tmp_path, "211", **pair)[0], "211")
    held = sum(stage.reference for stage in of_two) - sum(stage.reference for stage in stages)
    assert held == pytest.approx(4 * two.base.num_parameters, rel=TOLERANCE)
    sent = 4 * 2 * 64 * 48 * 4  # fp32 hidden states of four micro-batches
    assert of_two[0].messages == stages[0].messages + sent
    distilled = plan(layout_values(tmp_path, "211", **slm, loss="kl")[0], "211")[1]
    kept = (24 * 4 + 8) * 64 * 2  # its last hidden states and two numbers a token, of a micro-batch
    assert distilled[0].window == stages[0].window
    more = distilled[1].window - stages[1].window
    assert more >= kept
    assert more % kept == 0
    assert distilled[1].loss_head > stages[1].loss_head
