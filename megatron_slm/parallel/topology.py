"""Which rank is where: a pure map between ranks and (pipeline, data, tensor) coordinates.

The order is DeepSpeed's `PipeModelDataParallelTopology`: tensor-parallel ranks are neighbours, then
data-parallel, then pipeline stages, so that the chattiest axis stays inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """Where one rank stands on the three axes."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The sizes of the three axes and the map between ranks and coordinates."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in ("pipeline", "data", "tensor"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"{axis} parallel size", getattr(self, axis), "is at least 1", "give 1 or more")

    @classmethod
    def from_world(cls, world_size: int, *, tensor: int, pipeline: int) -> Topology:
        """The topology of a world; what tensor and pipeline parallelism leave over is data parallelism.

        Raises:
            LayoutError: the world is not a multiple of tensor x pipeline.
        """
        if world_size % (tensor * pipeline):
            raise LayoutError(
                "world size",
                world_size,
                f"is a multiple of --tensor-model-parallel-size ({tensor}) x "
                f"--pipeline-model-parallel-size ({pipeline})",
                f"start a multiple of {tensor * pipeline} processes or change the two sizes",
            )
        return cls(pipeline=pipeline, data=world_size // (tensor * pipeline), tensor=tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.tensor

    def rank(self, *, pipeline: int, data: int, tensor: int) -> int:
        """The rank at a coordinate."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, tensor=tensor)

    def tensor_groups(self) -> list[list[int]]:
        """The ranks of every tensor-parallel group, in one order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for t in range(self.tensor)]
            for p in range(self.pipeline)
            for d in range(self.data)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """The ranks of every pipeline, first stage first, in one order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for p in range(self.pipeline)]
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """The ranks that hold the same parameters of different micro-batches, in one order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, tensor=t) for d in range(self.data)]
            for p in range(self.pipeline)
            for t in range(self.tensor)
        ]
