"""The one division of a step: gradients of loss sums become those of the mean over all kept tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.engine.refusal import refusal
from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums, num_sums


def sum_over_world(vectors: Sequence[Tensor], device: torch.device, *, num_sources: int = 1) -> LossSums:
    """Add up the statistics of all micro-batches and ranks, the same bits on each. Collective over the world.

    Args:
        vectors: values of `LossSums`, fp64 [`num_sums`] each; none on ranks that computed no loss.
        num_sources: corpora of the run.
    """
    total = torch.zeros(num_sums(num_sources), dtype=torch.float64, device=device)
    if vectors:
        total += torch.stack(list(vectors)).sum(0)
    dist.all_reduce(total)
    return LossSums.of(total.tolist())  # a step's one transfer from the device


def step_factor(sums: LossSums, settings: StepSettings, data_parallel_size: int) -> float:
    """What gradients are multiplied by before the optimizer's step: 1 / divisor of the whole batch.

    ZeRO averages over data-parallel ranks; the sum over them is what is divided. NaN, which makes every optimizer
    skip the step as it does for gradients that are not finite, where the sums say that it must not be applied.
    """
    if refusal(sums, settings) is not None:
        return math.nan
    return data_parallel_size / sums.divisor


def accumulate_in_place(optimizer: Any) -> None:
    """Have BF16_Optimizer add each bf16 gradient to its fp32 sum in one pass, as soon as autograd has it, and free it.

    DeepSpeed makes a fp32 copy first; with the gradient zeroed before and kept after, that is 26 bytes of memory
    traffic a parameter and micro-batch instead of 10. The sums are the same bits.
    """
    sums, seen = optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients

    @torch.no_grad()
    def add(parameter: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is not None:
            sums[group][index].add_(parameter.grad.view(-1))
            parameter._hp_grad = sums[group][index]  # type: ignore[attr-defined]
            seen[group][index] = True

    assert optimizer.immediate_grad_update, "the DeepSpeed configuration of a run says so"
    optimizer._update_hp_grad = add


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
