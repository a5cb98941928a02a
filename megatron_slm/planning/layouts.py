"""Layouts: how a run is cut over ranks, and what its step is then made of. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.errors import LayoutError
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.batches import batch_arithmetic
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.job import Job

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""What a search tries."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to run a job on a world."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    micro_batch_size: int
    num_micro_batches: int
    """Of one step on one data-parallel rank."""
    sequence_parallel: bool
    recomputes: bool

    @property
    def topology(self) -> Topology:
        """Its axes."""
        return Topology(pipeline=self.pipeline, data=self.data, tensor=self.tensor)

    @property
    def sequence_shards(self) -> int:
        """Ranks over which the residual stream is cut along the sequence."""
        return self.tensor if self.sequence_parallel else 1

    def flags(self) -> dict[str, Any]:
        """The run's flags that ask for it (beside --deepspeed-config, which says the ZeRO stage)."""
        flags: dict[str, Any] = {
            "tensor-model-parallel-size": self.tensor,
            "pipeline-model-parallel-size": self.pipeline,
            "micro-batch-size": self.micro_batch_size,
        }
        if self.sequence_parallel:
            flags["sequence-parallel"] = True
        if self.recomputes:
            flags["recompute-granularity"] = "full"
        return flags

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def configured_layout(job: Job, world_size: int) -> Layout:
    """The layout that a run's own configuration asks for on a world.

    Raises:
        LayoutError: world, batch or stages are not divisible as asked.
    """
    parallel = job.config.parallel
    topology = Topology.from_world(
        world_size, tensor=parallel.tensor_model_parallel_size, pipeline=parallel.pipeline_model_parallel_size
    )
    check_stages(job.architecture.num_layers, topology.pipeline)
    _, num_micro_batches = batch_arithmetic(job.config, topology)
    return Layout(
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        data=topology.data,
        zero_stage=ds_config.zero_stage(job.deepspeed),
        micro_batch_size=job.config.training.micro_batch_size,
        num_micro_batches=num_micro_batches,
        sequence_parallel=parallel.sequence_parallel and topology.tensor > 1,
        recomputes=parallel.recompute_granularity == "full",
    )


def candidate_layouts(job: Job, world_size: int, *, max_tensor: int) -> Iterator[Layout]:
    """Every layout of a world that keeps the global batch, and that the models can be cut to.

    Args:
        max_tensor: ranks that tensor parallelism may span (a node's).

    Raises:
        LayoutError: the configuration leaves the global batch to the layout.
    """
    samples = job.config.training.global_batch_size
    if samples is None:
        raise LayoutError(
            "--global-batch-size",
            None,
            "is given (a search compares layouts of one batch)",
            "give the samples of a step",
        )
    for tensor in (t for t in range(1, max_tensor + 1) if world_size % t == 0 and _divides(job, t)):
        for pipeline in (p for p in range(1, job.architecture.num_layers + 1) if world_size // tensor % p == 0):
            data = world_size // tensor // pipeline
            for micro_batch_size in MICRO_BATCH_SIZES:
                if samples % (data * micro_batch_size):
                    continue
                for zero_stage in (1, 2, 3) if pipeline == 1 and data > 1 else (1,):
                    for recomputes in (False, True):
                        yield Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            data=data,
                            zero_stage=zero_stage,
                            micro_batch_size=micro_batch_size,
                            num_micro_batches=samples // (data * micro_batch_size),
                            sequence_parallel=tensor > 1 and job.config.data.seq_length % tensor == 0,
                            recomputes=recomputes,
                        )


def _divides(job: Job, tensor: int) -> bool:
    """Whether both models can be cut over so many tensor-parallel ranks (`parallel/layers.py` has the rules)."""
    return all(
        count % tensor == 0
        for arch in (job.architecture, job.reference)
        if arch is not None
        for count in (
            arch.num_attention_heads,
            arch.num_query_groups,
            arch.ffn_hidden_size,
            job.padded_vocabulary(arch),
        )
    )
