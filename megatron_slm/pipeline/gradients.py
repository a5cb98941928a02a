"""The one division of a step: gradients of loss sums become those of the mean over all kept tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.loss.objective import SOURCE_SUMS, LossSums


def sum_over_world(sums: LossSums, device: torch.device, *, num_sources: int = 1) -> LossSums:
    """Add up the statistics of all ranks, the same bits on each. Collective over the world.

    Args:
        num_sources: corpora of the run, which ranks that computed no loss do not see in `sums`.
    """
    *scalars, by_source = astuple(sums)
    count = len(SOURCE_SUMS) * num_sources if num_sources > 1 else 0
    padding = [0.0] * (count - len(by_source))
    values = torch.tensor([*scalars, *by_source, *padding], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return LossSums.of(values.tolist())


def step_factor(sums: LossSums, data_parallel_size: int) -> float:
    """What gradients are multiplied by before the optimizer's step: 1 / divisor of the whole batch.

    ZeRO averages over data-parallel ranks; the sum over them is what is divided. NaN, which makes the optimizer
    skip the step, where nothing could be kept because no loss was finite: a gradient of zeros would still decay
    weights and move moments.
    """
    if sums.nothing_finite:
        return math.nan
    return data_parallel_size / (sums.divisor or 1.0)


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
    if math.isnan(factor):  # looked for in the gradients themselves, before they are unscaled
        if getattr(optimizer, "offload_optimizer", False):  # ZeRO-3 took the norms as it sent the gradients down
            optimizer.norm_for_param_grads = dict.fromkeys(optimizer.norm_for_param_grads, factor)
        for group in optimizer.averaged_gradients.values():
            for gradient in group or ():
                if gradient is not None:
                    gradient.fill_(factor)
    optimizer.loss_scale = 1.0 / factor
    try:
        yield
    finally:
        optimizer.loss_scale = 1.0
