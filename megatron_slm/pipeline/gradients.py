"""The one division of a step: gradients of loss sums become those of the mean over all kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.loss.objective import LossSums


def sum_over_world(sums: LossSums, device: torch.device) -> LossSums:
    """Add up the statistics of all ranks, the same bits on each. Collective over the world."""
    values = torch.tensor(astuple(sums), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return LossSums(*values.tolist())


@contextmanager
def gradients_scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """Inside, the optimizer's step sees its gradients times `factor`, in its norm and its clipping too.

    ZeRO's loss scale divides gradients where they are unscaled and clipped, so it carries the factor for
    those optimizers; BF16_Optimizer has no loss scale, and its fp32 gradients are multiplied in place.
    """
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.mul_(factor)
        yield
        return
    optimizer.loss_scale = 1.0 / factor
    try:
        yield
    finally:
        optimizer.loss_scale = 1.0
