"""Assignment of layers to pipeline stages."""

from __future__ import annotations

from megatron_slm.errors import LayoutError


def stage_bounds(num_layers: int, num_stages: int) -> list[int]:
    """Partition the layer list (embedding, `num_layers` blocks, head) over the stages.

    Blocks are distributed as evenly as possible, with the extra ones on earlier stages; the embedding is on the first
    stage, the head on the last. A stage may have no block (a reference with few layers).

    Returns:
        num_stages + 1 indices: stage i has layers [bounds[i], bounds[i + 1]) of the list.
    """
    share, extra = divmod(num_layers, num_stages)
    bounds = [0]
    for stage in range(num_stages):
        num_layers_here = share
        if stage < extra:
            num_layers_here += 1
        if stage == 0:
            num_layers_here += 1  # the embedding
        if stage == num_stages - 1:
            num_layers_here += 1  # the head
        bounds.append(bounds[-1] + num_layers_here)
    return bounds


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
