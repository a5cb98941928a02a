"""The end of a step: gradients of loss sums are divided once, by the kept tokens of the whole batch, or discarded."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.skipping import skip_reason
from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums, SumLayout


def sum_over_world(
    vectors: Sequence[Tensor], layout: SumLayout, device: torch.device, *, rows: RowSampler | None = None
) -> LossSums:
    """Add up the sums of all micro-batches and ranks, the same bits on each. Collective over the world.

    Args:
        vectors: packed sums, one a micro-batch; none on ranks that computed no loss.
        rows: collects what the step's backward passes measured, by the same reduction.
    """
    total = torch.zeros(layout.size, dtype=torch.float64, device=device)
    if vectors:
        total += torch.stack(list(vectors)).sum(0)
    if rows is not None:
        total = torch.cat([total, rows.take_table(device)])
    dist.all_reduce(total)
    total = total.cpu()  # a step's one transfer from the device
    if rows is not None:
        rows.read(total[layout.size :].tolist())
    return layout.unpack(total[: layout.size])


def gradient_factor(sums: LossSums, settings: StepSettings, num_copies: int) -> float | None:
    """Return 1 / divisor of the whole batch, the factor of a step's gradients; None where the step is skipped.

    ZeRO averages gradients over the ranks with the same parameters; the divisor is that of their sum.
    """
    if skip_reason(sums, settings) is not None:
        return None
    return num_copies / sums.divisor


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

    assert optimizer.immediate_grad_update, "a run's DeepSpeed configuration sets immediate_grad_update"
    optimizer._update_hp_grad = add


class StepNorm:
    """The gradient norm of an optimizer's step, held against a limit."""

    exceeding: float | None = None
    """The norm before clipping, where it exceeds the limit and the step is skipped for it; else None."""


@contextmanager
def limited_norm(optimizer: Any, limit: float | None) -> Iterator[StepNorm]:
    """Have the optimizer's step inside skip gradients whose norm exceeds a limit; None has no limit.

    All of DeepSpeed's optimizers ask the function `is_invalid_grad_norm` of their module whether to skip a step for its
    norm, once the norm is known, the same on all ranks, and before anything is clipped: inside, the first answer is
    also yes above the limit.
    """
    norm = StepNorm()
    if limit is None:
        yield norm
        return
    module: Any = sys.modules[type(optimizer).__module__]
    is_invalid = module.is_invalid_grad_norm

    def is_invalid_or_exceeding(scaled: Any) -> bool:
        module.is_invalid_grad_norm = is_invalid  # later calls of a step ask about what was not skipped
        if is_invalid(scaled):
            return True
        # BF16_Optimizer has no loss scale
        found = float(scaled) / (1.0 if hasattr(optimizer, "fp32_groups_gradients_flat") else optimizer.loss_scale)
        norm.exceeding = found if found > limit else None
        return norm.exceeding is not None

    module.is_invalid_grad_norm = is_invalid_or_exceeding
    try:
        yield norm
    finally:
        module.is_invalid_grad_norm = is_invalid


@contextmanager
def scaled_gradients(optimizer: Any, factor: float | None) -> Iterator[None]:
    """Scale the gradients for the optimizer's step inside, for its norm and its clipping too; None skips that step.

    DeepSpeed's optimizers have no call that skips a step, and without the call for a step the gradients and the
    engine's counters would stay as they are. All of them skip a step whose gradients are not finite, on all ranks
    alike: so the factor of a step to skip is NaN.

    ZeRO's loss scale divides gradients where they are unscaled and clipped, and carries the factor for those
    optimizers. BF16_Optimizer has no loss scale: its fp32 gradients are multiplied in place.
    """
    skips, factor = factor is None, math.nan if factor is None else factor
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.mul_(factor)
        yield
        return
    if skips:
        _fill_with_nan(optimizer)
    optimizer.loss_scale = 1.0 / factor
    try:
        yield
    finally:
        optimizer.loss_scale = 1.0


def _fill_with_nan(optimizer: Any) -> None:
    """Make ZeRO's check for overflow fail, which reads gradients and norms before the loss scale is applied."""
    if getattr(optimizer, "offload_optimizer", False):  # ZeRO-3 took the norms as it sent the gradients to the host
        optimizer.norm_for_param_grads = dict.fromkeys(optimizer.norm_for_param_grads, math.nan)
    for group in optimizer.averaged_gradients.values():
        for gradient in group or ():
            if gradient is not None:
                gradient.fill_(math.nan)
