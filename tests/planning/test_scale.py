"""Plans of many ranks: published speeds, falling ones, and layouts that cannot be built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint.weights import READ_ELEMENTS
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


def test_zero_3_builds_shares_and_fills_them_block_by_block() -> None:
    """`tests/tools/test_benchmark_scale.py` measures what a rank's layers take while they are made."""
    n = 6_738_415_616
    building = planned("llama-2-7b", cluster(128)).building
    assert building.device == 2 * n // 128
    assert building.host == 8 * (PROCESS_BYTES + 3 * 4 * READ_ELEMENTS)
    large = planned("llama-2-7b", cluster(8)).building
    assert large.host == 8 * (PROCESS_BYTES + 2 * n // 8), "DeepSpeed lays the shares out in host memory"


def test_a_node_of_several_stages_fills_their_weights_block_by_block() -> None:
    plan = planned("llama-2-7b", cluster(8), steps=8, zero=1, pipeline=8)
    small = planned("tinyllama-1.1b", cluster(8), steps=8, zero=1, pipeline=2, tensor=4)
    assert plan.building.host - 8 * PROCESS_BYTES == 8 * 3 * 4 * READ_ELEMENTS
    assert small.building.host - 8 * PROCESS_BYTES == 8 * 3 * 4 * 32000 * 2048 // 4
    assert plan.building.device == small.building.device == 0


def test_a_layout_that_cannot_be_built_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout", "--gpu", "h100", "--model-config", "llama-2-70b", "--bf16", "--seq-length", "2048"]
    words += [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    words += ["--micro-batch-size", "1", "--global-batch-size", "1024", "--train-iters", "10", "--nodes", "128"]
    tensor = ["--tensor-model-parallel-size", "8"]
    assert main([*words, *tensor, "--deepspeed-config", "ds_configs/zero3_bf16.json", "--host-memory", "4"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --host-memory is '4 GiB': must be at least 5 GiB: through it the 8 ranks of a node")
    assert "Fix: take nodes with more host memory" in error
    assert main([*words, *tensor, "--deepspeed-config", "ds_configs/zero3_bf16.json"]) == 0
    assert "while building" in capsys.readouterr().out


def test_models_are_built_in_shares_where_they_train_so() -> None:
    """70B without tensor or pipeline parallelism: no rank holds it whole."""
    plan = planned("llama-2-70b", cluster(1024))
    assert plan.fits
    assert plan.building.device < 2**28
    assert plan.building.host < 8 * 2**30


LLAMA_34B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def test_34b_with_an_equal_reference_fits_on_64_gpus_of_80_gb(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_34B))
    values = {**FLAGS, "objective": "slm", "seq-length": 4096, "global-batch-size": 1024, "train-iters": 10}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    layout = Layout(
        tensor=1, pipeline=1, data=64, zero_stage=3, micro_batch_size=1, num_micro_batches=16, sequence_parallel=False,
        recomputation=Recomputation(granularity="selective"),
    )  # fmt: skip
    found = {}
    for more in ((), ("--whole-reference",)):
        config, _ = parse([*words, "--bf16", "--reference-load", str(tmp_path), *more])
        found[more] = estimate(plan_run(config, model_config=str(tmp_path)), layout, cluster(64, "a100-80g"))
    shared, whole = found.values()
    assert shared.fits
    assert not whole.fits
    n, block, vocabulary = 33_743_970_304, 692_076_544, 32000 * 8192
    held = shared.stages[0].reference
    assert whole.stages[0].reference == 2 * n
    assert held == pytest.approx(2 * (n / 64 + 2 * block), rel=1e-6)
    assert block > vocabulary, "two blocks are more than one and the output weight"
    assert shared.time.gradients > whole.time.gradients, "gathering takes time"


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
        assert plan.building.device <= plan.peak_bytes <= machines.usable_bytes
