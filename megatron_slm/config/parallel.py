"""Configuration of the parallel layout, recomputation and the reference's schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.recomputation import Recomputation
from megatron_slm.config.rules import require, require_given, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout. The data-parallel size is the world size / (tensor x pipeline x context size)."""

    tensor_model_parallel_size: int = 1
    """Number of ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages."""
    context_parallel_size: int = 1
    """Number of ranks that share every sequence, for long ones. Each computes two stretches of it, of 2 x size (the
    first with the last, and so on, so that all have the same work), and attends to the gathered keys and values."""
    sequence_parallel: bool = False
    """Partition norms and the residual stream along the sequence over the tensor-parallel ranks."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """full: compute blocks again in the backward pass, from their inputs. selective: keep the results of matrix
    products, and compute norms, attention's core and activations again (blocks are not compiled then). Default: store
    all activations."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With --recompute-granularity full. uniform: cut a stage's blocks into runs of --recompute-num-layers, which keep
    the input of their first block. block: compute only the first --recompute-num-layers blocks of a stage again, each
    from its input. Default: uniform."""
    recompute_num_layers: int | None = None
    """Number of blocks for --recompute-method. Default: 1."""
    offload_activations: bool = False
    """Keep the blocks' activations in the host's memory (pinned, on GPUs) until the backward pass; each is copied
    there and back by torch's save_on_cpu, beside nothing: step times grow by the copies."""
    reference_schedule: Literal["skewed", "bubble", "sequential", "ride-along"] = "skewed"
    """Schedule of the reference's forward passes; losses are bit-identical. skewed: ahead of time in idle slots of the
    pipeline, on later stages partly in the next step's. bubble: in idle slots of the preceding step. sequential: all
    before the model's passes. ride-along: each right before the model's (always with one stage, which is never
    idle)."""
    reference_schedule_warmup_steps: int = 0
    """Number of first steps to time for fitting the schedule; 0: use costs computed from the architectures."""
    whole_reference: bool = False
    """With ZeRO-3, keep the frozen reference whole on every rank. By default data-parallel ranks share its weights, as
    they do the model's, and gather each block just before it computes: less memory, more communication."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank, in minutes, before the run ends with an error."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file with the ZeRO stage, bucket sizes and communication settings. Default:
    ds_configs/zero1_bf16_pipeline.json."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "distributed_timeout_minutes",
        )
        require_not_negative(self, "reference_schedule_warmup_steps")
        require_positive(self, "recompute_num_layers")
        for name in ("recompute_method", "recompute_num_layers"):
            rule = "be used with --recompute-granularity full, which has blocks to choose"
            is_of_use = getattr(self, name) is None or self.recompute_granularity == "full"
            require(is_of_use, self, name, rule, "add --recompute-granularity full, or remove it")
        fix = "add --recompute-num-layers N, the number of blocks of a stage to compute again"
        counts = self.recompute_method != "block" or self.recompute_num_layers is not None
        require_given(counts, "recompute_num_layers", "--recompute-method block", fix)
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            self,
            "sequence_parallel",
            "be used with --tensor-model-parallel-size of 2 or more",
            "raise the tensor-parallel size, or remove it",
        )

    @property
    def recomputation(self) -> Recomputation:
        """The rule of what blocks keep for their backward passes."""
        return Recomputation(
            granularity=self.recompute_granularity,
            method=self.recompute_method or "uniform",
            num_layers=self.recompute_num_layers or 1,
        )
