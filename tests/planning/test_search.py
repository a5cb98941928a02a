"""The search against an exhaustive one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.errors import LayoutError
from megatron_slm.flags.load import parse
from megatron_slm.parallel.batches import divided_batch_sizes, evaluation_batch_size
from megatron_slm.planning.estimates import EQUAL, Estimate, estimate, search
from megatron_slm.planning.gpus import GPUS, Cluster
from megatron_slm.planning.layouts import candidate_layouts
from megatron_slm.planning.planned_run import PlannedRun, plan_run
from tests.support.runs import MODEL_FLAGS, flags, run_flags, save_hf_llama

CLUSTER = Cluster(gpu=GPUS["l40s"], num_nodes=2, gpus_per_node=2)


@pytest.fixture
def run(tmp_path: Path) -> PlannedRun:
    slm = {"objective": "slm", "reference_load": save_hf_llama(tmp_path / "reference")}
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 2816, "seq_length": 1024, "bf16": True}
    return plan_run(parse(flags(run_flags(tmp_path / "none", tmp_path, **slm, **sizes, global_batch_size=16)))[0])


def test_nothing_faster_is_missed(run: PlannedRun) -> None:
    best: dict[tuple[int, int, int], float] = {}
    for layout in candidate_layouts(run, 4, max_tensor=2):
        planned = estimate(run, layout, CLUSTER)
        key = (layout.tensor, layout.pipeline, layout.zero_stage)
        if planned.fits:
            best[key] = min(best.get(key, planned.time.total), planned.time.total)
    assert len(best) > 6
    found = search(run, CLUSTER, num_results=6)
    assert [e.time.total for e in found] == pytest.approx(sorted(best.values())[:6], rel=2 * EQUAL)
    assert len({(e.layout.tensor, e.layout.pipeline, e.layout.zero_stage) for e in found}) == 6


def test_what_does_not_fit_under_its_schedule_is_not_proposed(run: PlannedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Estimate, "fits", property(lambda self: False))
    with pytest.raises(LayoutError, match=r"--gpu is .*must hold one of \d+ layouts on 4 GPUs"):
        search(run, CLUSTER, num_results=3)


def test_no_layout_is_proposed_that_the_run_refuses(tmp_path: Path) -> None:
    offloads = {"offload_activations": True, "recompute_granularity": "selective"}
    for rows, expected in (({}, {None, "selective", "full"}), ({"backward_row_share": 0.7}, {"selective", "full"})):
        kind = {"backward_rows": "sampled" if rows else "exact"}
        values = run_flags(tmp_path / "none", tmp_path, **offloads, **kind, **rows)
        candidates = candidate_layouts(plan_run(parse(flags(values))[0]), 4, max_tensor=2)
        assert {layout.recomputation.granularity for layout in candidates} == expected
    of_model = dict.fromkeys((*(name.replace("-", "_") for name in MODEL_FLAGS), "init_method_std"))
    following = {"init_from": save_hf_llama(tmp_path / "model"), "reference_load": "init", "reference_update": "ema"}
    for changes, stages in (
        ({}, {1, 2, 3}), ({"objective": "slm", **of_model, **following}, {1, 2}), ({"compile_blocks": True}, {1, 2}),
    ):  # fmt: skip
        found = plan_run(parse(flags(run_flags(tmp_path / "none", tmp_path, **changes)))[0])
        assert {layout.zero_stage for layout in candidate_layouts(found, 4, max_tensor=2)} == stages


@pytest.mark.parametrize(
    ("batches", "largest"),
    [
        ({"global_batch_size": None, "step_batch_size_schedule": "0:8 1M:12"}, 12),
        ({"global_batch_size": 8, "eval_global_batch_size": 12}, 8),
    ],
    ids=["scheduled", "evaluated"],
)
def test_proposed_layouts_divide_every_batch_of_a_run(tmp_path: Path, batches: dict[str, Any], largest: int) -> None:
    def planned(**changes: Any) -> PlannedRun:
        return plan_run(parse(flags(run_flags(tmp_path / "none", tmp_path, **batches | changes)))[0])

    together = set()
    for layout in candidate_layouts(planned(), 4, max_tensor=2):
        together.add(layout.data * layout.micro_batch_size)
        assert layout.num_micro_batches * layout.data * layout.micro_batch_size == largest
        config = planned(micro_batch_size=layout.micro_batch_size).config
        divided_batch_sizes(config, layout.topology), evaluation_batch_size(config, layout.topology)
    assert together == {1, 2, 4}, "8 divides one of the batches alone"


def test_a_batch_that_no_layout_divides_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(gpu=GPUS["l40s"], num_nodes=8, gpus_per_node=2)
    for batches, said in (
        ({"global_batch_size": 9}, r"--global-batch-size is 9: must allow a layout on 16 GPUs that divides batch and"),
        (
            {"eval_global_batch_size": 9},
            r"--global-batch-size is 8: .*divides batch, --eval-global-batch-size \(9\) and",
        ),
        ({"global_batch_size": None, "step_batch_size_schedule": "0:9 1M:16"}, "--step-batch-size-schedule is '0:9 1M"),
    ):
        run = plan_run(parse(flags(run_flags(tmp_path / "none", tmp_path, **batches)))[0])
        with pytest.raises(LayoutError, match=said):
            search(run, cluster, num_results=1)
