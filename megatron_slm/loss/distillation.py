"""Distillation on the kept rows: their cross-entropy mixed with the divergence from a reference's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.config.distillation import DistillationConfig
from megatron_slm.loss.dense_distillation import dense_pass
from megatron_slm.loss.divergences import Divergence, DivergenceName, divergence_named
from megatron_slm.loss.passes import KeptRows
from megatron_slm.loss.selective_ce import RowLosses
from megatron_slm.loss.sparse_distillation import sparse_target
from megatron_slm.loss.vocab_parallel import VocabularyPart, loss_rows
from megatron_slm.types import DenseDistribution, Distribution, Selection


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a kept token: `(1 - weight) CE + weight T^2 D`, with both distributions at temperature T.

    The factor T^2 keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531, section 2).
    """

    divergence: DivergenceName
    weight: float
    temperature: float = 1.0
    skew: float = 0.5
    """Weight of the reference's distribution in the mixture of `jsd`."""

    @classmethod
    def from_config(cls, config: DistillationConfig) -> Distillation | None:
        """Build it from a run's flags; None for plain cross-entropy."""
        if config.loss == "ce":
            return None
        return cls(
            divergence=config.loss,
            weight=config.distillation_weight,
            temperature=config.distillation_temperature,
            skew=config.distillation_skew,
        )

    @property
    def formula(self) -> Divergence:
        """The divergence."""
        return divergence_named(self.divergence, skew=self.skew)

    def mixed(self, loss_K: Tensor, divergence_K: Tensor) -> Tensor:
        """Return the rows' losses from their cross-entropy and divergence, nats [K]."""
        return (1 - self.weight) * loss_K + self.weight * self.temperature**2 * divergence_K


def distilled_sum(
    losses: RowLosses, selection: Selection, distillation: Distillation, distribution: Distribution
) -> tuple[Tensor, Tensor]:
    """Sum the kept rows' mixed losses, each times its weight. Collective over the vocabulary's parts.

    Args:
        distribution: of the reference, for all rows.

    Returns:
        the sum, which carries the gradient of the model alone (differentiate it once), and the kept rows' divergence
        at the temperature, nats [K].
    """
    if not isinstance(distribution, DenseDistribution):
        target = sparse_target(losses, selection.kept_K, distribution, distillation.formula, distillation.weight)
        return losses.kept_sum(selection, target), target.divergence_K
    inputs = losses.hidden_Nd, losses.weight_Vd
    total, divergence_K = _DistilledSum.apply(*inputs, losses, selection, distillation, distribution)
    return total, divergence_K


class _DistilledSum(torch.autograd.Function):
    """Computes the gradient with the value, since the value takes the same pass over the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        losses: RowLosses,
        selection: Selection,
        distillation: Distillation,
        distribution: DenseDistribution,
    ) -> tuple[Tensor, Tensor]:
        kept_K, weight_K = selection
        loss_K, max_K, sum_K = (x[kept_K] for x in (losses.tokens.loss_N, losses.rows.max_N, losses.rows.sum_N))
        ones_K = torch.ones_like(loss_K) if weight_K is None else weight_K.to(loss_K.dtype)
        result = dense_pass(
            KeptRows(
                hidden_Kd=hidden_Nd[kept_K],
                local_label_K=losses.local_label_N[kept_K],
                kept_K=kept_K,
                max_K=max_K,
                factor_K=1 / sum_K,
                target_K=torch.expm1(-loss_K),
                softcap=losses.part.softcap,
            ),
            weight_Vd,
            _kept(distribution, kept_K, losses.part),
            distribution.weight_Vd,
            weight_K=ones_K,
            formula=distillation.formula,
            weight=distillation.weight,
            temperature=distillation.temperature,
            kernels=losses.kernels,
            part=losses.part,
            stash=losses.stash,
        )
        ctx.part, ctx.shape, ctx.dtype = losses.part, hidden_Nd.shape, hidden_Nd.dtype
        ctx.gradients = result.grad_hidden_Kd, result.grad_weight_Vd
        ctx.save_for_backward(kept_K)
        ctx.mark_non_differentiable(result.divergence_K)
        return (ones_K * distillation.mixed(loss_K, result.divergence_K)).sum(), result.divergence_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the distilled loss can be differentiated once: its gradient is scaled in place")
        (grad_Kd, grad_weight_Vd), ctx.gradients = ctx.gradients, None
        (kept_K,) = ctx.saved_tensors
        grad_hidden_Nd = grad_Kd.new_zeros(ctx.shape, dtype=ctx.dtype)
        grad_hidden_Nd[kept_K] = ctx.part.sum_rows(grad_Kd).mul_(grad).to(ctx.dtype)
        return grad_hidden_Nd, grad_weight_Vd.mul_(grad), None, None, None, None


def _kept(distribution: DenseDistribution, kept_K: Tensor, part: VocabularyPart) -> KeptRows:
    """The reference's kept rows, as the pass takes the model's; its labels do not matter."""
    max_K, sum_K = distribution.max_N[kept_K], distribution.sum_N[kept_K]
    nowhere_K = torch.full_like(kept_K, -1)
    return KeptRows(
        hidden_Kd=loss_rows(distribution.hidden_sbd, part.tp)[kept_K],
        local_label_K=nowhere_K,
        kept_K=kept_K,
        max_K=max_K,
        factor_K=1 / sum_K,
        target_K=torch.zeros_like(max_K),
        softcap=distribution.softcap,
    )
