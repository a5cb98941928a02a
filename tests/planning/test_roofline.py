"""The planner's times against the roofline model of the real code's kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.flags.load import parse
from megatron_slm.planning.estimates import Estimate, estimate
from megatron_slm.planning.gpus import GPUS, Cluster
from megatron_slm.planning.layouts import configured_layout
from megatron_slm.planning.planned_run import plan_run
from tests.support.fake_gpu import TOOLS
from tests.support.runs import flags

sys.path.insert(0, str(TOOLS))

from benchmarks.gpu_model import MODELS

EAGER = {"no-compile-blocks": True, "no-compile-elementwise": True}
RECORDS = json.loads((TOOLS.parent / "docs" / "benchmarks" / "gpu-model.json").read_text())


def planned(tmp_path: Path, name: str, objective: str, **changes: Any) -> Estimate:
    setting = MODELS[name]
    arch = setting["arch"]
    shape = {**arch, "intermediate_size": arch["ffn_hidden_size"], "num_key_value_heads": arch["num_query_groups"]}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "num_hidden_layers": shape["num_layers"], "head_dim": shape["kv_channels"], "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rope_theta": 10000.0, "vocab_size": shape["vocab_size"],
        **{k: shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")},
    }))  # fmt: skip
    values = {
        "data-path": "none", "tokenizer-type": "NullTokenizer", "vocab-size": arch["vocab_size"] - 1, "bf16": True,
        "seq-length": setting["length"], "micro-batch-size": setting["samples"], "train-iters": 10,
        "global-batch-size": setting["samples"] * setting["micro_batches"], "objective": objective,
        "pipeline-model-parallel-size": setting["stages"], "slm-keep-ratio": setting["keep"],
        "reference-schedule": "ride-along", "make-vocab-size-divisible-by": 1,
    }  # fmt: skip
    if objective == "slm":
        values["reference-config"] = values["reference-load"] = config
    run = plan_run(parse(flags({**values, **changes}))[0], model_config=str(config))
    cluster = Cluster(gpu=GPUS["h100"], num_nodes=setting["stages"], gpus_per_node=1)
    return estimate(run, configured_layout(run, setting["stages"]), cluster)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['name']} {r['objective']} {r['blocks']}")
def test_the_plan_is_near_the_model_of_the_real_kernels(record: dict[str, Any], tmp_path: Path) -> None:
    blocks = EAGER if record["blocks"] == "eager" else {}
    plan = planned(tmp_path, record["name"], record["objective"], **blocks)
    rate = plan.tokens_per_second / plan.cluster.num_gpus
    assert rate == pytest.approx(record["tokens_per_second"], rel=0.10)


def test_compiled_blocks_and_sampled_rows_are_faster(tmp_path: Path) -> None:
    plain = planned(tmp_path, "7b", "clm", **EAGER).time.schedule
    compiled = planned(tmp_path, "7b", "clm", **{"compile-blocks": True}).time.schedule
    assert 0.75 < compiled / plain < 0.92
    assert planned(tmp_path, "7b", "clm", **{"no-compile-blocks": True}).time.schedule == compiled
    assert planned(tmp_path, "7b", "clm").time.schedule == compiled
    sampled = {"backward-rows": "sampled", "backward-row-share": 0.7}
    rows = planned(tmp_path, "7b", "clm", **sampled).durations
    assert 0.7 < sum(rows.backward) / sum(rows.exact_backward) < 0.85
