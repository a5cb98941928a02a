"""Completes the user's DeepSpeed JSON from the run's configuration.

Batch sizes, precision, clipping and the optimizer are configured by flags only. The JSON has "auto" there or omits
them; any other value must match, or the run ends before it starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_slm.config.rules import require
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, suggest_name

_JSON = "DeepSpeed JSON"
_ZERO_1 = "ds_configs/zero1_bf16_pipeline.json"
DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""Default without --deepspeed-config; equals ds_configs/zero1_bf16_pipeline.json."""


def read_json(path: str | None) -> dict[str, Any]:
    """Read the user's DeepSpeed JSON.

    Raises:
        ConfigError: unreadable file, or not a JSON object.
    """
    if path is None:
        return json.loads(json.dumps(DEFAULT))
    try:
        loaded = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            "--deepspeed-config", path, f"be a readable file ({error.strerror})", "check the path"
        ) from error
    except ValueError as error:
        raise ConfigError("--deepspeed-config", path, f"be JSON ({error})", "correct the line it names") from error
    if not isinstance(loaded, dict):
        raise ConfigError("--deepspeed-config", path, "contain a JSON object", "compare with the files in ds_configs/")
    return loaded


def zero_stage(config: dict[str, Any]) -> int:
    """Return the configured ZeRO stage; 0 by default."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check(user: dict[str, Any], run: RunConfig) -> None:
    """Check for settings that DeepSpeed ignores, trains wrongly with, or cannot combine.

    Raises:
        ConfigError: unknown or unsupported names; ZeRO stage 0 (clips by wrong norms under pipelines, accumulates in
            bf16), 2 or 3 with more than one pipeline stage, or 3 with a reference that follows the model.
    """
    _check_sections(user)
    stage, field = zero_stage(user), f"{_JSON}: zero_optimization.stage"
    if stage not in (1, 2, 3):
        raise ConfigError(
            field,
            stage,
            "be 1, 2 or 3 (at 0, DeepSpeed clips by a wrong norm and accumulates bf16 gradients in bf16)",
            f"use {_ZERO_1}",
        )
    _check_second_shares(user["zero_optimization"], run)
    if stage > 1 and run.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            field,
            stage,
            "be 1 with --pipeline-model-parallel-size above 1 (a limit of DeepSpeed)",
            f"use {_ZERO_1}, or one pipeline stage",
        )
    update = run.reference_update
    rule = "be none with ZeRO-3, whose ranks hold no whole weights"
    require(stage != 3 or not update.updates, update, "reference_update", rule, "use ZeRO-1 or ZeRO-2")


def resolve(user: dict[str, Any], run: RunConfig, *, data_parallel_size: int, num_micro_batches: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run, without its `monitors`, which the run serves itself.

    Raises:
        ConfigError: the user's JSON contradicts the run's configuration, or has unsupported settings.
    """
    check(user, run)
    _check_size_of_second_shares(user["zero_optimization"], data_parallel_size)
    merged = json.loads(json.dumps({name: value for name, value in user.items() if name not in _MONITORS}))
    offloads = offloads_optimizer(user)
    for path, value in _decided(run, data_parallel_size, num_micro_batches, offloads=offloads).items():
        _fill(merged, path.split("."), value, path)
    if merged.get("communication_data_type", "auto") == "auto":
        merged["communication_data_type"] = "fp32"  # DeepSpeed's default reduces gradients in bf16
    _check_no_auto_left(merged, "")
    return merged


_COMMUNICATION_BYTES = {"fp32": 4, "bf16": 2}


def communication_bytes(config: dict[str, Any]) -> int:
    """Return the bytes per number in the reduction of gradients over data-parallel ranks."""
    name = config.get("communication_data_type", "auto")
    return _COMMUNICATION_BYTES["fp32" if name == "auto" else name]


_SECTIONS = (
    "bf16",
    "zero_optimization",
    "pipeline",
    "data_types",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "activation_checkpointing",
    "aio",
)
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_VALUES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "zero_force_ds_cpu_optimizer",
    "memory_breakdown",
)
_UNSUPPORTED = {
    "optimizer": "use flags such as --lr",
    "scheduler": "use --lr-decay-style",
    "fp16": "use --bf16, or fp32",
    "flops_profiler": "it crashes DeepSpeed's pipeline engine with more than one stage",
}


def _check_sections(user: dict[str, Any]) -> None:
    """Check the names and types of the JSON.

    Raises:
        ConfigError: unknown or unsupported name, or a section that is not an object.
    """
    for name, value in user.items():
        if name in _UNSUPPORTED and value not in (None, {}, {"enabled": False}):
            raise ConfigError(f"{_JSON}: {name}", value, f"be absent ({_UNSUPPORTED[name]})", "remove it")
        if name not in (*_SECTIONS, *_VALUES, *_UNSUPPORTED):
            fix = suggest_name(name, (*_SECTIONS, *_VALUES), "compare with the files in ds_configs/")
            raise ConfigError(f"{_JSON}: key", name, "be a supported setting", fix)
        if name in _SECTIONS and not isinstance(value, dict):
            fix = "compare with the files in ds_configs/"
            raise ConfigError(f"{_JSON}: {name}", value, "be an object", fix)
    zero = user.get("zero_optimization", {})
    if not isinstance(zero.get("stage", 0), int):
        raise ConfigError(f"{_JSON}: zero_optimization.stage", zero["stage"], "be 1, 2 or 3", f"use {_ZERO_1}")
    if user.get("communication_data_type", "auto") not in ("auto", *_COMMUNICATION_BYTES):
        given = user["communication_data_type"]
        raise ConfigError(f"{_JSON}: communication_data_type", given, "be fp32 or bf16", "remove it for fp32")
    _check_offload(zero)


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Return True if master weights, moments and summed gradients stay in host memory and are updated there."""
    return _offload_device(config.get("zero_optimization", {}), "offload_optimizer") != "none"


def _offload_device(zero: dict[str, Any], name: str) -> Any:
    section = zero.get(name) or {}
    return section.get("device", "none") if isinstance(section, dict) else section


def _check_offload(zero: dict[str, Any]) -> None:
    """Check that offloading is off, or of the whole optimizer state to the host with ZeRO-3.

    Only ZeRO-3 sums offloaded gradients in fp32.

    Raises:
        ConfigError: offloaded parameters, another stage, another device, or partial offload.
    """
    if _offload_device(zero, "offload_param") != "none":
        rule = "be absent (parameters stay on the device; only their optimizer state may be offloaded)"
        raise ConfigError(f"{_JSON}: zero_optimization.offload_param", zero["offload_param"], rule, "remove it")
    device = _offload_device(zero, "offload_optimizer")
    if device == "none":
        return
    field, fix = f"{_JSON}: zero_optimization.offload_optimizer", "use ds_configs/zero3_offload.json"
    if zero.get("stage") != 3:
        rule = "be used with stage 3 (at lower stages, DeepSpeed sums offloaded gradients in bf16)"
        raise ConfigError(field, zero["offload_optimizer"], rule, fix)
    section = zero["offload_optimizer"]
    if not isinstance(section, dict) or device != "cpu" or section.get("ratio", 1.0) != 1.0:
        raise ConfigError(field, section, "be an object with device cpu and no ratio below 1", fix)


def _check_second_shares(zero: dict[str, Any], run: RunConfig) -> None:
    """Check that the ranks which hold second shares of weights together have the same weights.

    Raises:
        ConfigError: they are tensor-parallel ranks: DeepSpeed takes consecutive ranks of the world.
    """
    name, tensor = "zero_hpz_partition_size", run.parallel.tensor_model_parallel_size
    if zero["stage"] == 3 and zero.get(name, 1) not in (0, 1) and tensor > 1:
        rule = f"be 1 with --tensor-model-parallel-size above 1 ({tensor}), whose adjacent ranks have other weights"
        raise ConfigError(f"{_JSON}: zero_optimization.{name}", zero[name], rule, "remove it, or use 1 tensor rank")


def _check_size_of_second_shares(zero: dict[str, Any], data_parallel_size: int) -> None:
    """Check that as many ranks as hold second shares of weights together divide the data-parallel ranks.

    Raises:
        ConfigError: they do not.
    """
    name = "zero_hpz_partition_size"
    size = zero.get(name)
    if zero["stage"] != 3 or not isinstance(size, int) or size < 1:
        return  # DeepSpeed refuses what is no size
    if data_parallel_size % min(size, data_parallel_size):
        rule = f"divide the {data_parallel_size} data-parallel ranks"
        raise ConfigError(f"{_JSON}: zero_optimization.{name}", size, rule, "use the GPUs of a node")


def monitors(user: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of additional metrics backends; `resolve` omits them."""
    return {name: section for name, section in user.items() if name in _MONITORS}


def _check_no_auto_left(value: Any, name: str) -> None:
    if value == "auto":
        raise ConfigError(
            f"{_JSON}: {name}", value, "have a value (no flag of the run sets it)", "replace auto by a value"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_no_auto_left(inner, f"{name}.{key}".lstrip("."))


def _decided(run: RunConfig, data_parallel_size: int, num_micro_batches: int, *, offloads: bool) -> dict[str, Any]:
    batch = run.training.micro_batch_size
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": batch * num_micro_batches * data_parallel_size,
        "gradient_clipping": run.optimizer.clip_grad,  # DeepSpeed's default is 1.0
        "bf16.enabled": run.training.bf16,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,  # crashes DeepSpeed's engine with more than one stage
        # partitioned messages between stages train silently wrong under sequence parallelism
        "pipeline.pipe_partitioned": False,
        "pipeline.grad_partitioned": False,
        "pipeline.use_reentrant": False,
        "pipeline.activation_checkpoint_interval": 1 if run.parallel.recompute_granularity == "full" else 0,
    }
    if run.health.grad_norm_skip_threshold is not None:
        decided["zero_optimization.compute_grad_norm"] = True
    if offloads:
        decided["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own is compiled at start, torch's AdamW is not
    if run.training.bf16:
        decided["data_types.grad_accum_dtype"] = "fp32"
        decided["bf16.check_grad_overflow"] = True
        decided["bf16.immediate_grad_update"] = True  # with the sums in fp32: the same bits, fewer passes over memory
    return decided


def _fill(config: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    *sections, last = path
    for section in sections:
        config = config.setdefault(section, {})
    given = config.get(last, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f"{_JSON}: {name}",
            given,
            f"match the run's configuration ({value!r})",
            'use "auto", or remove it',
        )
    config[last] = value
