"""Maps ranks to (pipeline, data, tensor) coordinates and back.

The order is that of DeepSpeed's `PipeModelDataParallelTopology`: tensor-parallel ranks are adjacent, then data-parallel
ranks, then pipeline stages, so that the axis with the most communication stays within a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """Position of a rank on the three axes."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the three axes, and the map between ranks and coordinates."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {
            "--pipeline-model-parallel-size": self.pipeline,
            "data-parallel size": self.data,
            "--tensor-model-parallel-size": self.tensor,
        }
        for name, size in sizes.items():
            if size < 1:
                raise LayoutError(name, size, "be at least 1", "use 1 or more")

    @classmethod
    def from_world(cls, world_size: int, *, tensor: int, pipeline: int) -> Topology:
        """Return the topology of a world, with data-parallel size world_size / (tensor x pipeline).

        Raises:
            LayoutError: the world size is not a multiple of tensor x pipeline.
        """
        if world_size % (tensor * pipeline):
            raise LayoutError(
                "world size",
                world_size,
                f"be a multiple of --tensor-model-parallel-size ({tensor}) x "
                f"--pipeline-model-parallel-size ({pipeline})",
                f"start a multiple of {tensor * pipeline} processes or change the two sizes",
            )
        return cls(pipeline=pipeline, data=world_size // (tensor * pipeline), tensor=tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.tensor

    def rank(self, *, pipeline: int, data: int, tensor: int) -> int:
        """Return the rank at a coordinate."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, tensor=tensor)

    def tensor_groups(self) -> list[list[int]]:
        """Return the ranks of every tensor-parallel group, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for t in range(self.tensor)]
            for p in range(self.pipeline)
            for d in range(self.data)
        ]

    def sharing_groups(self, size: int) -> list[list[int]]:
        """Return each tensor-parallel group cut into runs of `size` ranks, which share a key/value head."""
        return [ranks[i : i + size] for ranks in self.tensor_groups() for i in range(0, self.tensor, size)]

    def pipeline_groups(self) -> list[list[int]]:
        """Return the ranks of every pipeline, first stage first, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for p in range(self.pipeline)]
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """Return the ranks of every data-parallel group, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for d in range(self.data)]
            for p in range(self.pipeline)
            for t in range(self.tensor)
        ]

    def model_groups(self) -> list[list[int]]:
        """Return the ranks of every copy of the model, all stages and slices, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for p in range(self.pipeline) for t in range(self.tensor)]
            for d in range(self.data)
        ]

    def neighbors(self, first_stage: int) -> list[list[int]]:
        """Return the disjoint pairs of neighbors: each pipeline's ranks of stages (i, i + 1), i = `first_stage` + 2 k.

        Those from stage 0 and those from stage 1 are together all neighbors.
        """
        return [
            [pipeline[i], pipeline[i + 1]]
            for i in range(first_stage, self.pipeline - 1, 2)
            for pipeline in self.pipeline_groups()
        ]
