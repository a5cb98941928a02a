"""Which layers stand on which pipeline stage."""

from __future__ import annotations

from megatron_slm.errors import LayoutError


def stage_bounds(num_layers: int, num_stages: int) -> list[int]:
    """Cut the layer list (embedding, `num_layers` blocks, head) over the stages.

    Blocks are spread as evenly as they go, earlier stages taking one more; the embedding stands on the
    first stage and the head on the last. A stage may hold no block (a reference with few layers).

    Returns:
        num_stages + 1 indices: stage i holds layers [bounds[i], bounds[i + 1]) of the list.
    """
    share, extra = divmod(num_layers, num_stages)
    bounds = [0]
    for stage in range(num_stages):
        blocks = share + (stage < extra)
        bounds.append(bounds[-1] + blocks + (stage == 0) + (stage == num_stages - 1))
    return bounds


def check_stages(num_layers: int, num_stages: int) -> None:
    """Refuse a pipeline with more stages than blocks.

    Raises:
        LayoutError: a stage of the model would hold no block.
    """
    if num_layers < num_stages:
        raise LayoutError(
            "--pipeline-model-parallel-size",
            num_stages,
            f"is at most the number of layers ({num_layers})",
            "use fewer stages, so that each holds a block",
        )
