"""Predicts the memory that a run needs before its first step, while its models are built. Pure.

Each rank makes the layers of its stage on its GPU in the run's dtype, with ZeRO-3 its share of them, and fills them
through a few blocks of fp32 numbers in host memory. Before it fills them, ZeRO-3's engine lays a rank's share out anew,
by way of a copy in host memory. ZeRO-2's engine partitions its state after the layers are there, beside the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.weights import READ_ELEMENTS
from megatron_slm.errors import LayoutError
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.layouts import Layout
from megatron_slm.planning.memory import StageMemory, model_parameters
from megatron_slm.planning.planned_run import PlannedRun

PROCESS_BYTES = 450 * 2**20
"""Host memory of a rank before it builds anything: the interpreter and its libraries (259 MiB without sharing on a
CPU), and CUDA's context."""
_COPIES = 3
"""Of the block of a weight that is filled: as it is stored or drawn, in fp32, and with its neighbours."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class BuildMemory:
    """The most memory that building takes."""

    host: int
    """Bytes of a node's host memory, on the node that needs most."""
    device: int
    """Bytes of a GPU before ZeRO-2 or 3 adds its state: no more than in training. 0 with ZeRO-1."""

    def check(self, cluster: Cluster) -> None:
        """Raise LayoutError if a node cannot hold it."""
        if self.host > cluster.host_bytes:
            raise LayoutError(
                "--host-memory",
                f"{cluster.host_bytes / 2**30:g} GiB",
                f"be at least {self.host / 2**30:.0f} GiB: through it the {cluster.gpus_per_node} ranks of a node "
                "pass their weights, beside what is offloaded there",
                "take nodes with more host memory, or fewer ranks a node",
            )

    def fits(self, cluster: Cluster) -> bool:
        """True if every node can hold it; a GPU that can train can."""
        return self.host <= cluster.host_bytes

    def to_dict(self) -> dict[str, int]:
        """Return JSON-compatible values."""
        return asdict(self)


def build_memory(run: PlannedRun, layout: Layout, stages: Sequence[StageMemory], cluster: Cluster) -> BuildMemory:
    """Return the memory that building a layout takes.

    Args:
        stages: memory of the stages in training, for offloaded optimizers and the weights of the references.
    """
    models = model_parameters(run, layout)
    partitions = layout.topology.copies if layout.zero_stage == 3 else 1
    layers = [run.dtype_bytes * ceil_div(parameters.total, partitions) for parameters in models]
    ranks = []
    for parameters, held, stage in zip(models, layers, stages, strict=True):
        filling = _COPIES * _FP32 * min(READ_ELEMENTS, max(parameters.sizes, default=0)) + stage.host
        laid_out = held if layout.zero_stage == 3 else 0
        ranks.append(PROCESS_BYTES + max(laid_out, filling))
    device = 0
    if layout.zero_stage > 1:
        device = max(held + stage.reference for held, stage in zip(layers, stages, strict=True))
    return BuildMemory(host=_fullest_node(ranks, layout.tensor * layout.topology.copies, cluster), device=device)


def _fullest_node(bytes_of_rank: list[int], ranks_per_stage: int, cluster: Cluster) -> int:
    """Return the most bytes of a node, whose ranks are consecutive, given those of a rank of each stage."""
    before = [0, *accumulate(held * ranks_per_stage for held in bytes_of_rank)]

    def up_to(rank: int) -> int:
        stage = rank // ranks_per_stage
        return before[stage] + (rank % ranks_per_stage) * (bytes_of_rank[stage] if stage < len(bytes_of_rank) else 0)

    starts = range(0, cluster.num_gpus, cluster.gpus_per_node)
    return max(up_to(min(cluster.num_gpus, start + cluster.gpus_per_node)) - up_to(start) for start in starts)
