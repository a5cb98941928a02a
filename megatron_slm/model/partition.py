"""Assignment of layers to pipeline stages."""

from __future__ import annotations

from itertools import accumulate

from megatron_slm.errors import LayoutError


def stage_bounds(num_layers: int, num_stages: int) -> list[int]:
    """Partition the layer list (embedding, `num_layers` blocks, head) over the stages.

    Blocks are distributed as evenly as possible, with the extra ones on earlier stages; the embedding is on the first
    stage, the head on the last. A stage may have no block (a reference with few layers).

    Returns:
        num_stages + 1 indices: stage i has layers [bounds[i], bounds[i + 1]) of the list.
    """
    layers = stage_blocks(num_layers, num_stages)
    layers[0] += 1  # the embedding
    layers[-1] += 1  # the head
    return [0, *accumulate(layers)]


def stage_blocks(num_layers: int, num_stages: int) -> list[int]:
    """Number of blocks of each stage."""
    share, extra = divmod(num_layers, num_stages)
    return [share + 1 if stage < extra else share for stage in range(num_stages)]


def check_stages(num_layers: int, num_stages: int) -> None:
    """Check that every stage of the model has a block.

    Raises:
        LayoutError: more stages than blocks.
    """
    if num_layers < num_stages:
        raise LayoutError(
            "--pipeline-model-parallel-size",
            num_stages,
            f"not exceed the number of layers ({num_layers})",
            "use fewer stages",
        )
