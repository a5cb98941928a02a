"""Maps ranks to (pipeline, data, context, tensor) coordinates and back.

Tensor-parallel ranks are adjacent, then those that share a sequence, then data-parallel ranks, then pipeline stages, so
that the axis with the most communication stays within a node. It is the order of DeepSpeed's
`PipeModelDataParallelTopology`, to which a context-parallel rank is one more data-parallel rank: both train the same
parameters on tokens of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """Position of a rank on the four axes."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the four axes, and the map between ranks and coordinates."""

    pipeline: int = 1
    data: int = 1
    """Ranks that read micro-batches of their own."""
    context: int = 1
    """Ranks that share every sequence of a micro-batch."""
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {
            "--pipeline-model-parallel-size": self.pipeline,
            "data-parallel size": self.data,
            "--context-parallel-size": self.context,
            "--tensor-model-parallel-size": self.tensor,
        }
        for name, size in sizes.items():
            if size < 1:
                raise LayoutError(name, size, "be at least 1", "use 1 or more")

    @classmethod
    def from_world(cls, world_size: int, *, tensor: int, pipeline: int, context: int = 1) -> Topology:
        """Return the topology of a world, with data-parallel size world_size / (tensor x pipeline x context).

        Raises:
            LayoutError: the world size is not a multiple of tensor x pipeline x context.
        """
        taken = tensor * pipeline * context
        if world_size % taken:
            sizes = f"--tensor-model-parallel-size ({tensor}) x --pipeline-model-parallel-size ({pipeline})"
            if context > 1:
                sizes += f" x --context-parallel-size ({context})"
            raise LayoutError(
                "world size",
                world_size,
                f"be a multiple of {sizes}",
                f"start a multiple of {taken} processes or change the sizes",
            )
        return cls(pipeline=pipeline, data=world_size // taken, context=context, tensor=tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.copies * self.tensor

    @property
    def copies(self) -> int:
        """Number of ranks with the same parameters, over which ZeRO sums gradients and partitions its state."""
        return self.data * self.context

    def describe(self) -> str:
        """Describe the axes, for people."""
        context = f"{self.context} context parallel x " if self.context > 1 else ""
        return f"{self.pipeline} stages x {self.data} data parallel x {context}{self.tensor} tensor parallel"

    def rank(self, *, pipeline: int, data: int, tensor: int, context: int = 0) -> int:
        """Return the rank at a coordinate."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, context=context, tensor=tensor)

    def tensor_groups(self) -> list[list[int]]:
        """Return the ranks of every tensor-parallel group, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, context=c, tensor=t) for t in range(self.tensor)]
            for p in range(self.pipeline)
            for d, c in self._copies()
        ]

    def sharing_groups(self, size: int) -> list[list[int]]:
        """Return each tensor-parallel group cut into runs of `size` ranks, which share a key/value head."""
        return [ranks[i : i + size] for ranks in self.tensor_groups() for i in range(0, self.tensor, size)]

    def pipeline_groups(self) -> list[list[int]]:
        """Return the ranks of every pipeline, first stage first, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, context=c, tensor=t) for p in range(self.pipeline)]
            for d, c in self._copies()
            for t in range(self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """Return the ranks with the same parameters, by data, then context rank; in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, context=c, tensor=t) for d, c in self._copies()]
            for p in range(self.pipeline)
            for t in range(self.tensor)
        ]

    def context_groups(self) -> list[list[int]]:
        """Return the ranks of every context-parallel group, in the same order on all ranks."""
        return [
            [self.rank(pipeline=p, data=d, context=c, tensor=t) for c in range(self.context)]
            for p in range(self.pipeline)
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def model_groups(self) -> list[list[int]]:
        """Return the ranks of every copy of the model, all stages and slices, in the same order on all ranks."""
        return [
            [
                self.rank(pipeline=p, data=d, context=c, tensor=t)
                for p in range(self.pipeline)
                for t in range(self.tensor)
            ]
            for d, c in self._copies()
        ]

    def _copies(self) -> list[tuple[int, int]]:
        """Data and context rank of every copy of the model."""
        return [(d, c) for d in range(self.data) for c in range(self.context)]

    def neighbors(self, first_stage: int) -> list[list[int]]:
        """Return the disjoint pairs of neighbors: each pipeline's ranks of stages (i, i + 1), i = `first_stage` + 2 k.

        Those from stage 0 and those from stage 1 are together all neighbors.
        """
        return [
            [pipeline[i], pipeline[i + 1]]
            for i in range(first_stage, self.pipeline - 1, 2)
            for pipeline in self.pipeline_groups()
        ]
