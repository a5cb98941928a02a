"""Plans of many ranks: published speeds, falling ones, and layouts that cannot be built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_slm.cli.plan import main
from megatron_slm.config.recomputation import KEEP_ALL, Recomputation
from megatron_slm.errors import LayoutError
from megatron_slm.flags.load import parse
from megatron_slm.planning.building import PROCESS_BYTES
from megatron_slm.planning.communication import all_reduce_seconds, exposed_seconds, latency_seconds
from megatron_slm.planning.estimates import Estimate, estimate, search
from megatron_slm.planning.gpus import GPUS, Cluster
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.planned_run import PlannedRun, plan_run
from tests.support.fake_gpu import TOOLS

FLAGS = {"vocab-size": 31999, "data-path": "none", "tokenizer-type": "NullTokenizer", "objective": "clm"}
EAGER = ("--no-compile-blocks", "--no-compile-elementwise")
"""Without compiled element-wise work: nothing published says that these speeds were measured with it."""
GIB = 2**30


def run_of(model: str, **changes: Any) -> PlannedRun:
    values = {**FLAGS, "seq-length": 2048, "global-batch-size": 1024, "train-iters": 10, **changes}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return plan_run(parse([*words, "--bf16", *EAGER])[0], model_config=model)


def cluster(gpus: int, gpu: str = "h100", **changes: Any) -> Cluster:
    return Cluster(gpu=GPUS[gpu], num_nodes=gpus // 8, gpus_per_node=8, **changes)


def planned(
    model: str, machines: Cluster, *, samples: int = 1, steps: int = 1, seq: int = 2048, **sizes: Any
) -> Estimate:
    tensor, pipeline = sizes.get("tensor", 1), sizes.get("pipeline", 1)
    layout = Layout(
        tensor=tensor, pipeline=pipeline, data=machines.num_gpus // tensor // pipeline, zero_stage=sizes.get("zero", 3),
        micro_batch_size=samples, num_micro_batches=steps, sequence_parallel=tensor > 1,
        recomputation=Recomputation(granularity="full") if sizes.get("recomputes") else KEEP_ALL,
    )  # fmt: skip
    return estimate(run_of(model, **{"seq-length": seq}), layout, machines)


PUBLISHED = [
    # llm-foundry, scripts/train/benchmarking/README.md: MPT with FSDP (full shard) on H100, bf16, 2,048 tokens
    ("llama-2-13b", cluster(8), {"samples": 2}, 4792),
    ("llama-2-13b", cluster(64), {"samples": 2}, 4800),
    ("llama-2-70b", cluster(32), {"samples": 2, "steps": 16, "recomputes": True}, 882),
    ("llama-2-70b", cluster(64), {"samples": 8, "steps": 4, "recomputes": True}, 1039),
    # torchtitan, docs/performance.md: Llama 2 and 3 with FSDP2 on 64 A100
    ("llama-2-13b", cluster(64, "a100-80g"), {"samples": 2, "seq": 4096}, 2162),
    ("llama-2-70b", cluster(64, "a100-80g"), {"samples": 2, "seq": 4096, "recomputes": True}, 353),
    ("llama-3.1-8b", cluster(64, "a100-80g"), {"samples": 1, "seq": 8192}, 2904),
]


@pytest.mark.parametrize(("model", "machines", "changes", "tokens_per_second"), PUBLISHED)
def test_published_speeds(model: str, machines: Cluster, changes: dict[str, Any], tokens_per_second: float) -> None:
    plan = planned(model, machines, **changes)
    assert plan.tokens_per_second / machines.num_gpus == pytest.approx(tokens_per_second, rel=0.16)


@pytest.mark.parametrize("sizes", [{"zero": 3}, {"zero": 1, "tensor": 2}, {"zero": 1, "tensor": 4, "pipeline": 2}])
def test_a_gpu_gets_slower_the_more_there_are(sizes: dict[str, int]) -> None:
    """The same work a GPU, and no faster network."""
    rates = [
        planned("llama-2-7b", cluster(gpus), samples=4, steps=8, **sizes).tokens_per_second / gpus
        for gpus in (64, 512, 1024)
    ]
    assert rates[0] > rates[1] > rates[2] > 0.5 * rates[0]


def test_fewer_micro_batches_a_rank_cost_more_at_one_batch() -> None:
    """1,024 samples: what is done once a step is shared by less work, the more ranks there are."""
    mfu = {gpus: planned("llama-2-7b", cluster(gpus), steps=1024 // gpus).mfu for gpus in (64, 512, 1024)}
    assert mfu[64] > mfu[512] > mfu[1024]


def test_collectives_take_time_without_bytes() -> None:
    machines = cluster(512)
    assert latency_seconds(1, 1, machines) == 0.0
    inside, ring = latency_seconds(8, 1, machines), latency_seconds(512, 1, machines)
    assert 20e-6 < inside < 40e-6
    assert 0.8e-3 < ring < 2e-3, "511 steps, 63 of them between nodes"
    assert latency_seconds(64, 8, machines) > latency_seconds(64, 1, machines), "every step is between nodes"
    assert all_reduce_seconds(0.0, 8, 1, machines, num_calls=3) == pytest.approx(6 * inside)
    assert exposed_seconds(1.0, 10.0) == pytest.approx(0.1)
    assert exposed_seconds(10.0, 1.0) == pytest.approx(9.1)


def test_layers_are_built_in_their_dtype_whole_at_any_zero_stage() -> None:
    """`tools/benchmark.py scale` measures a rank's peak, where host and device are one: no copy in fp32 is in it."""
    records = json.loads((TOOLS.parent / "docs" / "benchmarks" / "scale.json").read_text())
    (record,) = [r for r in records if "ZeRO-3" in r["name"] and r["build_bytes_per_parameter"]]
    assert 2 < record["build_bytes_per_parameter"] < 4, "DeepSpeed's buckets come on top of the layers"
    building = planned("llama-2-7b", cluster(64)).building
    assert building.device == 2 * 6_738_415_616
    assert building.host == 8 * (PROCESS_BYTES + 3 * 4 * 32000 * 4096)


def test_a_node_of_several_stages_fills_their_largest_weights() -> None:
    plan = planned("llama-2-7b", cluster(8), steps=8, zero=1, pipeline=8)
    whole = planned("llama-2-7b", cluster(8), steps=8, zero=1, tensor=1)
    assert plan.building.host - 8 * PROCESS_BYTES == 3 * 4 * 4096 * (2 * 32000 + 6 * 11008)
    assert plan.building.device == whole.building.device == 0


def test_a_layout_that_cannot_be_built_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout", "--gpu", "h100", "--model-config", "llama-2-70b", "--bf16", "--seq-length", "2048"]
    words += [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    words += ["--micro-batch-size", "1", "--global-batch-size", "1024", "--train-iters", "10", "--nodes", "128"]
    tensor = ["--tensor-model-parallel-size", "8"]
    assert main([*words, *tensor, "--deepspeed-config", "ds_configs/zero3_bf16.json", "--host-memory", "24"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(
        "error: --host-memory is '24 GiB': must be at least 27 GiB: through it the 8 ranks of a node"
    )
    assert "Fix: take nodes with more host memory" in error
    assert main([*words, *tensor, "--deepspeed-config", "ds_configs/zero3_bf16.json"]) == 0
    assert "while building" in capsys.readouterr().out
    whole = planned("llama-2-70b", cluster(1024, host_memory=4096.0))
    assert whole.peak_bytes < cluster(1024).usable_bytes, "in training it would fit"
    assert not whole.fits
    with pytest.raises(
        LayoutError, match=r"GPU memory while building is '128.5 GiB'.*after all of them are on the GPU"
    ):
        whole.building.check(whole.cluster, whole.layout)


def test_a_search_names_what_building_needs() -> None:
    run = run_of("tinyllama-1.1b", **{"global-batch-size": 8})
    with pytest.raises(LayoutError, match=r"--host-memory is '4 GiB': must be at least \d+ GiB"):
        search(run, cluster(8, host_memory=4.0), num_results=1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-2-13b", "llama-2-70b"])
@pytest.mark.parametrize("gpus", [64, 512, 1024])
def test_every_proposal_can_be_built(model: str, gpus: int) -> None:
    machines = cluster(gpus, host_memory=256.0)
    found = search(run_of(model, **{"seq-length": 4096}), machines, num_results=8)
    for plan in found:
        assert plan.building.host <= 256 * GIB
        assert plan.building.device <= machines.usable_bytes
