"""Parallel layout, recomputation and the reference's schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over the ranks; what is left of the world is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Stages the layers are cut into."""
    sequence_parallel: bool = False
    """Cut norms and the residual stream along the sequence over the tensor-parallel ranks."""
    recompute_granularity: Literal["full"] | None = None
    """`full` recomputes each block in the backward pass instead of keeping its activations."""
    reference_schedule: Literal["skewed", "bubble", "sequential", "ride-along"] = "skewed"
    """When the reference's forward passes run; the losses are the same bits. skewed: ahead, in the pipeline's idle
    slots, and on later stages partly in the next step's. bubble: in idle slots of the step before. sequential: all
    before the model's. ride-along: each right before the model's (always so with one stage, which never idles)."""
    reference_schedule_warmup_steps: int = 0
    """Time this many first steps and fit the schedule to them; 0: to costs counted from the architectures."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank; beyond it the run ends with an error that names what was waited for."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON: ZeRO stage and its buckets, communication (default: ds_configs/zero1_bf16_pipeline.json)."""

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "distributed_timeout_minutes"
        )
        warmup = self.reference_schedule_warmup_steps
        require(warmup >= 0, "reference_schedule_warmup_steps", warmup, "is 0 or more", "give 0 or more")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel",
            True,
            "needs --tensor-model-parallel-size of 2 or more",
            "raise the tensor-parallel size or leave it out",
        )
