from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse


def run(*flags: str) -> RunConfig:
    return parse(["--train-iters", "3", "--objective", "clm", "--micro-batch-size", "2", *flags])[0]


def resolve(user: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    return ds_config.resolve(user, config, data_parallel_size=4, num_micro_batches=3)


@pytest.mark.parametrize("path", sorted(Path("ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_resolve(path: Path) -> None:
    bf16 = path.stem != "fp32_cpu"
    resolved = resolve(ds_config.read_json(str(path)), run(*["--bf16"] * bf16, "--clip-grad", "0.7"))
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["gradient_clipping"] == 0.7
    assert resolved["bf16"]["enabled"] is bf16
    assert "auto" not in json.dumps(resolved)


def test_the_default_is_the_shipped_zero_1() -> None:
    shipped = ds_config.read_json("ds_configs/zero1_bf16_pipeline.json")
    assert resolve(ds_config.read_json(None), run()) == resolve(shipped, run())


def test_what_trains_silently_wrong_is_always_off() -> None:
    resolved = resolve(ds_config.read_json(None), run("--clip-grad", "0", "--recompute-granularity", "full"))
    assert resolved["gradient_clipping"] == 0.0  # DeepSpeed's default would clip at 1.0
    assert resolved["pipeline"] == {
        "pipe_partitioned": False,
        "grad_partitioned": False,
        "use_reentrant": False,
        "activation_checkpoint_interval": 1,
    }
    for stage in (1, 2, 3):
        resolved = resolve({"zero_optimization": {"stage": stage}}, run("--bf16"))
        assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("user", "match"),
    [
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 7}, "train_batch_size is 7"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.3}, "gradient_clipping is 0.3"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "bf16.enabled is True"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, "optimizer"),
        ({"zero_optimization": {"stage": 1}, "pipeline": {"pipe_partitioned": True}}, "pipe_partitioned is True"),
        ({}, "zero_optimization.stage is 0"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
        ({"zero_optimization": True}, "must be an object"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "reduce_bucket_size is 'auto'"),
        ({"zero_optimisation": {"stage": 1}}, r"did you mean zero_optimization\?"),
        ({"zero_optimization": {"stage": 1}, "flops_profiler": {"enabled": True}}, "flops_profiler"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "must be used with stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "device cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "must be an object with device cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "no ratio below 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "parameters stay on the device"),
        ({"zero_optimization": {"stage": 1}, "communication_data_type": "fp16"}, "must be fp32 or bf16"),
    ],
)
def test_contradictions_are_refused(user: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve(user, run())


def test_gradients_are_reduced_in_fp32_unless_the_file_says_otherwise() -> None:
    for said, expected in ((None, "fp32"), ("auto", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
        user = {"zero_optimization": {"stage": 2}, **({"communication_data_type": said} if said else {})}
        assert resolve(user, run("--bf16"))["communication_data_type"] == expected
        assert ds_config.communication_bytes(user) == {"fp32": 4, "bf16": 2}[expected]


def test_the_file_for_the_cpu_is_for_fp32() -> None:
    with pytest.raises(ConfigError, match=r"bf16\.enabled is False"):
        resolve(ds_config.read_json("ds_configs/fp32_cpu.json"), run("--bf16"))


def test_zero_2_and_3_need_one_stage() -> None:
    with pytest.raises(ConfigError, match="pipeline-model-parallel-size above 1"):
        resolve({"zero_optimization": {"stage": 3}}, run("--pipeline-model-parallel-size", "2"))


def test_second_shares_are_of_ranks_with_the_same_weights() -> None:
    user = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert resolve(user, run())["zero_optimization"]["zero_hpz_partition_size"] == 2
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size is 2: must be 1 with --tensor-model-parallel-size"):
        resolve(user, run("--tensor-model-parallel-size", "2"))
    user["zero_optimization"]["zero_hpz_partition_size"] = 8
    assert resolve(user, run())["zero_optimization"]["zero_hpz_partition_size"] == 8
    user["zero_optimization"]["zero_hpz_partition_size"] = 3
    with pytest.raises(ConfigError, match="zero_hpz_partition_size is 3: must divide the 4 data-parallel ranks"):
        resolve(user, run())
    user["zero_optimization"]["zero_hpz_partition_size"] = "auto"
    with pytest.raises(ConfigError, match="zero_hpz_partition_size is 'auto': must have a value"):
        resolve(user, run())


def test_zero_3_keeps_no_whole_weights_for_a_reference_that_follows_the_model() -> None:
    """A plan of a layout refuses it as a run does."""
    user = {"zero_optimization": {"stage": 3}}
    flags = "--train-iters 3 --objective slm --init-from x --reference-load init --reference-update ema"
    follows = parse(flags.split())[0]
    ds_config.check({"zero_optimization": {"stage": 2}}, follows)
    with pytest.raises(ConfigError, match="--reference-update is 'ema': must be none with ZeRO-3"):
        ds_config.check(user, follows)


@pytest.mark.parametrize(("text", "match"), [("{", "must be JSON"), ("[1]", "must contain a JSON object")])
def test_unreadable_files_are_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=match):
        ds_config.read_json(str(tmp_path / "ds.json"))
    with pytest.raises(ConfigError, match="must be a readable file"):
        ds_config.read_json(str(tmp_path / "absent.json"))
