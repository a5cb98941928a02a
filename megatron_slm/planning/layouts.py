"""Layouts: the sharding of a run over ranks, and the micro-batches of its step. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.recomputation import KEEP_ALL, Granularity, Recomputation
from megatron_slm.errors import LayoutError
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.batches import check_lengths, divided_batch_sizes, evaluation_batch_size, samples_together
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.planned_run import PlannedRun

GRANULARITIES: tuple[Granularity | None, ...] = (None, "selective", "full")
"""Recomputation that a search tries, the least first."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes that a search tries."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes and batch sizes of a run on a number of ranks."""

    tensor: int
    pipeline: int
    data: int
    context: int = 1
    zero_stage: int
    micro_batch_size: int
    num_micro_batches: int
    """Micro-batches per step and data-parallel rank."""
    sequence_parallel: bool
    recomputation: Recomputation = KEEP_ALL
    """The rule of what blocks keep for their backward passes."""
    offloads: bool = False
    """True if they keep it in the host's memory."""

    @property
    def topology(self) -> Topology:
        """The axes of the ranks."""
        return Topology(pipeline=self.pipeline, data=self.data, context=self.context, tensor=self.tensor)

    @property
    def sequence_shards(self) -> int:
        """Number of ranks that share the sequence of the residual stream."""
        return self.tensor if self.sequence_parallel else 1

    def flags(self) -> dict[str, Any]:
        """Return the run's flags for this layout; the ZeRO stage is set in --deepspeed-config."""
        flags: dict[str, Any] = {
            "tensor-model-parallel-size": self.tensor,
            "pipeline-model-parallel-size": self.pipeline,
            "micro-batch-size": self.micro_batch_size,
        }
        if self.context > 1:
            flags["context-parallel-size"] = self.context
        if self.sequence_parallel:
            flags["sequence-parallel"] = True
        rule = self.recomputation
        if rule.granularity is not None:
            flags["recompute-granularity"] = rule.granularity
        if rule.method == "block" or rule.num_layers > 1:
            flags |= {"recompute-method": rule.method, "recompute-num-layers": rule.num_layers}
        if self.offloads:
            flags["offload-activations"] = True
        return flags

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self) | {"recomputes": self.recomputation.granularity == "full"}


def configured_layout(run: PlannedRun, world_size: int) -> Layout:
    """Return the layout of a run's own configuration on `world_size` ranks.

    Raises:
        LayoutError: ranks, batch or stages are not divisible as configured.
    """
    parallel = run.config.parallel
    topology = Topology.from_world(
        world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )
    check_lengths(run.config, topology)
    check_stages(run.architecture.num_layers, topology.pipeline)
    evaluation_batch_size(run.config, topology)
    num_micro_batches = divided_batch_sizes(run.config, topology).largest // samples_together(run.config, topology)
    return Layout(
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        data=topology.data,
        context=topology.context,
        zero_stage=ds_config.zero_stage(run.deepspeed),
        micro_batch_size=run.config.training.micro_batch_size,
        num_micro_batches=num_micro_batches,
        sequence_parallel=parallel.sequence_parallel and topology.tensor > 1,
        recomputation=parallel.recomputation,
        offloads=parallel.offload_activations,
    )


def candidate_layouts(run: PlannedRun, world_size: int, *, max_tensor: int) -> Iterator[Layout]:
    """Yield every layout on `world_size` ranks that divides all batches of the run and that fits the models' shapes.

    The context-parallel size is the configured one. Of scheduled batch sizes the layout has the largest.

    Args:
        max_tensor: maximum tensor-parallel size (the GPUs of a node).

    Raises:
        LayoutError: --global-batch-size is missing.
    """
    if not run.config.names_batch_size:
        purpose = "a search, which compares layouts of one batch"
        raise LayoutError.missing("--global-batch-size", purpose, "give the number of samples of a step")
    context, length = run.config.parallel.context_parallel_size, run.config.data.seq_length
    check_lengths(run.config, Topology(context=context))
    if world_size % context:
        rule, fix = f"divide the number of GPUs, {world_size}", "choose another"
        raise LayoutError("--context-parallel-size", context, rule, fix)
    world_size //= context
    samples, divided = run.config.batch_sizes(default=1).largest, _batch_sizes(run)
    for tensor in (t for t in range(1, max_tensor + 1) if world_size % t == 0 and _divides(run, t)):
        for pipeline in (p for p in range(1, run.architecture.num_layers + 1) if world_size // tensor % p == 0):
            data = world_size // tensor // pipeline
            for micro_batch_size in MICRO_BATCH_SIZES:
                if any(size % (data * micro_batch_size) for size in divided):
                    continue
                for zero_stage in _zero_stages(run) if pipeline == 1 and data * context > 1 else (1,):
                    for granularity in _granularities(run):
                        yield Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            data=data,
                            context=context,
                            zero_stage=zero_stage,
                            micro_batch_size=micro_batch_size,
                            num_micro_batches=samples // (data * micro_batch_size),
                            sequence_parallel=tensor > 1 and length // context % tensor == 0,
                            recomputation=Recomputation(granularity=granularity),
                            offloads=run.config.parallel.offload_activations,
                        )


def _batch_sizes(run: PlannedRun) -> list[int]:
    """Samples of the run's global batches, in training and in evaluations."""
    evaluated = run.config.logging.eval_global_batch_size
    return [*run.config.batch_sizes(default=1).sizes, *([] if evaluated is None else [evaluated])]


def _zero_stages(run: PlannedRun) -> tuple[int, ...]:
    """Those that a run of one pipeline stage may have.

    References that follow the model, and compiled blocks, need whole weights.
    """
    needs_whole = run.config.reference_update.updates or run.config.backend.compile_blocks
    return (1, 2) if needs_whole else (1, 2, 3)


def _granularities(run: PlannedRun) -> list[Granularity | None]:
    """Those that a run may have.

    Selective recomputation is of eager blocks with norms before attention and MLP; sampled rows offload only what is
    kept for a recomputation.
    """
    selects = not run.config.backend.compile_blocks and run.architecture.norm_placement == "before"
    keeps = run.config.backward.is_exact or not run.config.parallel.offload_activations
    ways = {"selective": selects, None: keeps}
    return [granularity for granularity in GRANULARITIES if ways.get(granularity, True)]


def _divides(run: PlannedRun, tensor: int) -> bool:
    """Return True if all models can be sharded over `tensor` ranks, by the rules of `parallel/layers.py`."""
    return all(
        count % tensor == 0
        for arch in (run.architecture, *run.references)
        for count in (
            arch.num_attention_heads,
            arch.num_query_groups if arch.num_query_groups > tensor else tensor % arch.num_query_groups,
            arch.num_query_groups * arch.kv_channels,
            arch.ffn_hidden_size,
            run.padded_vocabulary(arch),
        )
    )
