"""The DeepSpeed configuration: the user's JSON with what our configuration decides filled in.

Batch sizes, precision, clipping and the optimizer live in our configuration only. The JSON says "auto" there
or leaves them out; anything else has to agree, or the run ends before it starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_slm.config.sections import RunConfig
from megatron_slm.errors import ConfigError

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""Used without --deepspeed-config; the content of ds_configs/zero1.json."""


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


def check_zero(stage: int, run: RunConfig) -> None:
    """Refuse ZeRO stages that DeepSpeed trains wrongly or cannot combine.

    Raises:
        ConfigError: stage 0 (clips by wrong norms under pipelines, accumulates in bf16), or 2 or 3 with stages.
    """
    field = "zero_optimization.stage"
    if stage not in (1, 2, 3):
        raise ConfigError(
            field,
            stage,
            "is 1, 2 or 3 (at 0 DeepSpeed clips by a wrong norm and trains bf16 without fp32 sums)",
            "use ds_configs/zero1.json",
        )
    if stage > 1 and run.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            field,
            stage,
            "is 1 with --pipeline-model-parallel-size above 1 (DeepSpeed's rule)",
            "use ds_configs/zero1.json, or one pipeline stage",
        )


def resolve(user: dict[str, Any], run: RunConfig, *, data_parallel_size: int, num_micro_batches: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Raises:
        ConfigError: the user's JSON contradicts the run's configuration, or asks for what does not work.
    """
    check_zero(zero_stage(user), run)
    merged = json.loads(json.dumps(user))
    for path, value in _decided(run, data_parallel_size, num_micro_batches, zero_stage(user)).items():
        _fill(merged, path.split("."), value, path)
    for name in ("optimizer", "scheduler", "fp16"):
        section = merged.get(name)
        if section and not (name == "fp16" and section.get("enabled") is False):
            raise ConfigError(
                f"DeepSpeed JSON: {name}",
                section,
                "is left out (it is set by flags such as --lr, --bf16)",
                "remove it from the JSON",
            )
    return merged


def _decided(run: RunConfig, data_parallel_size: int, num_micro_batches: int, stage: int) -> dict[str, Any]:
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
    if run.training.bf16:
        decided["data_types.grad_accum_dtype"] = "fp32" if stage == 1 else None
        decided["bf16.check_grad_overflow"] = True
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
    if value is None:
        del config[last]
