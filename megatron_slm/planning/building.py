"""Predicts the memory that a run needs before its first step, while its models are built. Pure.

Each rank makes the layers of its stage on its GPU in the run's dtype, whole at any ZeRO stage, and fills them one
weight at a time, which passes through host memory in fp32. Engines of ZeRO-2 and 3 partition the layers only after all
of them are there, beside the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import LayoutError
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.memory import StageMemory, model_parameters
from megatron_slm.planning.parameters import StageParameters
from megatron_slm.planning.planned_run import PlannedRun

PROCESS_BYTES = 450 * 2**20
"""Host memory of a rank before it builds anything: the interpreter and its libraries (259 MiB without sharing on a
CPU), and CUDA's context."""
_COPIES = 3
"""Of the whole weight that is filled: drawn, scaled, and cut to what the rank holds."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class BuildMemory:
    """The most memory that building takes."""

    host: int
    """Bytes of a node's host memory, on the node that needs most."""
    device: int
    """Bytes of a GPU."""

    def check(self, cluster: Cluster, layout: Layout) -> None:
        """Raise LayoutError if a node or a GPU cannot hold it."""
        if self.host > cluster.host_bytes:
            raise LayoutError(
                "--host-memory",
                f"{cluster.host_bytes / 2**30:g} GiB",
                f"be at least {self.host / 2**30:.0f} GiB: through it the {cluster.gpus_per_node} ranks of a node "
                "fill their weights in fp32, one at a time, beside what is offloaded there",
                "take nodes with more host memory, or fewer ranks a node",
            )
        if self.device > cluster.usable_bytes:
            raise LayoutError(
                "GPU memory while building",
                f"{self.device / 2**30:.1f} GiB",
                f"be at most {cluster.usable_bytes / 2**30:.1f} GiB: ZeRO-{layout.zero_stage} partitions the rank's "
                "layers after all of them are on the GPU, beside the references",
                "raise --tensor-model-parallel-size, or use ZeRO-1 with --pipeline-model-parallel-size",
            )

    def fits(self, cluster: Cluster) -> bool:
        """True if every node and GPU can hold it."""
        return self.host <= cluster.host_bytes and self.device <= cluster.usable_bytes

    def to_dict(self) -> dict[str, int]:
        """Return JSON-compatible values."""
        return asdict(self)


def build_memory(run: PlannedRun, layout: Layout, stages: Sequence[StageMemory], cluster: Cluster) -> BuildMemory:
    """Return the memory that building a layout takes.

    Args:
        stages: memory of the stages in training, for offloaded optimizers and the weights of the references.
    """
    models = model_parameters(run, layout)
    ranks = [
        PROCESS_BYTES + _COPIES * _FP32 * _largest_weight(run.architecture, parameters) + stage.host
        for parameters, stage in zip(models, stages, strict=True)
    ]
    device = 0
    if layout.zero_stage > 1:
        held = (run.dtype_bytes * parameters.total for parameters in models)
        device = max(layers + stage.reference for layers, stage in zip(held, stages, strict=True))
    return BuildMemory(host=_fullest_node(ranks, layout.tensor * layout.topology.copies, cluster), device=device)


def _largest_weight(arch: Architecture, parameters: StageParameters) -> int:
    """Return the elements of a stage's largest weight, as it is before tensor-parallel ranks share it."""
    has_vocabulary = parameters.has_embedding or parameters.has_head
    return arch.hidden_size * max(arch.ffn_hidden_size, arch.vocab_size if has_vocabulary else 0)


def _fullest_node(bytes_of_rank: list[int], ranks_per_stage: int, cluster: Cluster) -> int:
    """Return the most bytes of a node, whose ranks are consecutive, given those of a rank of each stage."""
    before = [0, *accumulate(held * ranks_per_stage for held in bytes_of_rank)]

    def up_to(rank: int) -> int:
        stage = rank // ranks_per_stage
        return before[stage] + (rank % ranks_per_stage) * (bytes_of_rank[stage] if stage < len(bytes_of_rank) else 0)

    starts = range(0, cluster.num_gpus, cluster.gpus_per_node)
    return max(up_to(min(cluster.num_gpus, start + cluster.gpus_per_node)) - up_to(start) for start in starts)
