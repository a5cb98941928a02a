"""The DeepSpeed configuration: the user's JSON with what our configuration decides filled in.

Batch sizes, precision, clipping and the optimizer live in our configuration only. The JSON says "auto" there
or leaves them out; anything else has to agree, or the run ends before it starts.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError

_ZERO_1 = "ds_configs/zero1_bf16_pipeline.json"
DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""Used without --deepspeed-config; the content of ds_configs/zero1_bf16_pipeline.json."""


def read_json(path: str | None) -> dict[str, Any]:
    """The user's DeepSpeed JSON.

    Raises:
        ConfigError: it cannot be read or is not a JSON object.
    """
    if path is None:
        return json.loads(json.dumps(DEFAULT))
    try:
        loaded = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            "--deepspeed-config", path, f"is a readable file ({error.strerror})", "check the path"
        ) from error
    except ValueError as error:
        raise ConfigError("--deepspeed-config", path, f"is JSON ({error})", "correct the line named") from error
    if not isinstance(loaded, dict):
        raise ConfigError("--deepspeed-config", path, "is a JSON object", "see the files in ds_configs/")
    return loaded


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage asked for; 0 where none is."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check(user: dict[str, Any], run: RunConfig) -> None:
    """Refuse settings that DeepSpeed would read past, trains wrongly with, or cannot combine.

    Raises:
        ConfigError: unknown or refused names; ZeRO stage 0 (clips by wrong norms under pipelines, accumulates in
            bf16), or 2 or 3 with more than one pipeline stage.
    """
    _check_sections(user)
    stage, field = zero_stage(user), "zero_optimization.stage"
    if stage not in (1, 2, 3):
        raise ConfigError(
            field,
            stage,
            "is 1, 2 or 3 (at 0 DeepSpeed clips by a wrong norm and trains bf16 without fp32 sums)",
            f"use {_ZERO_1}",
        )
    if stage > 1 and run.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            field,
            stage,
            "is 1 with --pipeline-model-parallel-size above 1 (DeepSpeed's rule)",
            f"use {_ZERO_1}, or one pipeline stage",
        )


def resolve(user: dict[str, Any], run: RunConfig, *, data_parallel_size: int, num_micro_batches: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run, but for its `monitors`, which the run serves itself.

    Raises:
        ConfigError: the user's JSON contradicts the run's configuration, or asks for what does not work.
    """
    check(user, run)
    merged = json.loads(json.dumps({name: value for name, value in user.items() if name not in _MONITORS}))
    offloads = offloads_optimizer(user)
    for path, value in _decided(run, data_parallel_size, num_micro_batches, offloads=offloads).items():
        _fill(merged, path.split("."), value, path)
    if merged.get("communication_data_type", "auto") == "auto":
        merged["communication_data_type"] = "fp32"  # DeepSpeed's own default rounds gradient sums to bf16 on their way
    _refuse_leftover_auto(merged, "")
    return merged


_COMMUNICATION_BYTES = {"fp32": 4, "bf16": 2}


def communication_bytes(config: dict[str, Any]) -> int:
    """Bytes of a number in the reduction of gradients over data-parallel ranks."""
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
_REFUSED = {
    "optimizer": "it is set by flags such as --lr",
    "scheduler": "it is set by --lr-decay-style",
    "fp16": "use --bf16, or fp32",
    "flops_profiler": "it crashes DeepSpeed's pipeline engine with more than one stage",
}


def _check_sections(user: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would read past, or what does not work here.

    Raises:
        ConfigError: a name that is unknown or refused, or a section that is not an object.
    """
    for name, value in user.items():
        if name in _REFUSED and value not in (None, {}, {"enabled": False}):
            raise ConfigError(f"DeepSpeed JSON: {name}", value, f"is left out ({_REFUSED[name]})", "remove it")
        if name not in (*_SECTIONS, *_VALUES, *_REFUSED):
            near = difflib.get_close_matches(name, (*_SECTIONS, *_VALUES), n=1)
            hint = f"did you mean {near[0]}?" if near else "see the files in ds_configs/"
            raise ConfigError("DeepSpeed JSON", name, "is a setting this system passes on", hint)
        if name in _SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"DeepSpeed JSON: {name}", value, "is an object", "see the files in ds_configs/")
    zero = user.get("zero_optimization", {})
    if not isinstance(zero.get("stage", 0), int):
        raise ConfigError("zero_optimization.stage", zero["stage"], "is 1, 2 or 3", f"use {_ZERO_1}")
    if user.get("communication_data_type", "auto") not in ("auto", *_COMMUNICATION_BYTES):
        given = user["communication_data_type"]
        raise ConfigError("DeepSpeed JSON: communication_data_type", given, "is fp32 or bf16", "leave it out for fp32")
    _check_offload(zero)


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether master weights, moments and summed gradients are in the host's memory, and updated there."""
    return _offload_device(config.get("zero_optimization", {}), "offload_optimizer") != "none"


def _offload_device(zero: dict[str, Any], name: str) -> Any:
    section = zero.get(name) or {}
    return section.get("device", "none") if isinstance(section, dict) else section


def _check_offload(zero: dict[str, Any]) -> None:
    """The optimizer's state may be offloaded to the host with ZeRO-3, which alone sums offloaded gradients in fp32.

    Raises:
        ConfigError: parameters are offloaded, or the optimizer at another stage, elsewhere or in part.
    """
    if _offload_device(zero, "offload_param") != "none":
        rule = "is left out (parameters stay on the device; their optimizer state may be offloaded)"
        raise ConfigError("zero_optimization.offload_param", zero["offload_param"], rule, "remove it")
    device = _offload_device(zero, "offload_optimizer")
    if device == "none":
        return
    field, fix = "zero_optimization.offload_optimizer", "use ds_configs/zero3_offload.json"
    if zero.get("stage") != 3:
        rule = "goes with stage 3 (before it DeepSpeed sums offloaded gradients in bf16)"
        raise ConfigError(field, zero["offload_optimizer"], rule, fix)
    section = zero["offload_optimizer"]
    if not isinstance(section, dict) or device != "cpu" or section.get("ratio", 1.0) != 1.0:
        raise ConfigError(field, section, "is an object with device cpu, and no ratio below 1", fix)


def monitors(user: dict[str, Any]) -> dict[str, Any]:
    """The sections that say where metrics go beside the run's folder; `resolve` leaves them out."""
    return {name: section for name, section in user.items() if name in _MONITORS}


def _refuse_leftover_auto(value: Any, name: str) -> None:
    if value == "auto":
        raise ConfigError(
            f"DeepSpeed JSON: {name}", value, "is a setting the run's configuration fills", "give a value"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_leftover_auto(inner, f"{name}.{key}".lstrip("."))


def _decided(run: RunConfig, data_parallel_size: int, num_micro_batches: int, *, offloads: bool) -> dict[str, Any]:
    batch = run.training.micro_batch_size
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": batch * num_micro_batches * data_parallel_size,
        "gradient_clipping": run.optimizer.clip_grad,  # DeepSpeed's own default is 1.0, so always said
        "bf16.enabled": run.training.bf16,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,  # crashes DeepSpeed's engine with more than one stage
        # partitioned messages between stages train silently wrong under sequence parallelism
        "pipeline.pipe_partitioned": False,
        "pipeline.grad_partitioned": False,
        "pipeline.use_reentrant": False,
        "pipeline.activation_checkpoint_interval": 1 if run.parallel.recompute_granularity == "full" else 0,
    }
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
            f"DeepSpeed JSON: {name}",
            given,
            f"agrees with the run's configuration, which says {value!r}",
            'write "auto" there, or leave it out',
        )
    config[last] = value
