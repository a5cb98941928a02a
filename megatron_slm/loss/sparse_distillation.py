"""Distillation from probabilities of a few ids a token: the ids, and all others as one outcome.

The model's distribution is reduced to the same outcomes, whose divergence is a number of [K, k] tables; the gradient
of an id outside of the table is its probability times one factor a row, so that the loss's second pass stays as it is
and gets k numbers a row added.

Shapes: K kept rows, k ids of each, d hidden, V vocabulary rows held here, B rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.blocks import accumulation_dtype
from megatron_slm.loss.divergences import Divergence
from megatron_slm.loss.passes import SparseTarget
from megatron_slm.loss.selective_ce import RowLosses
from megatron_slm.loss.soft_cap import cap_
from megatron_slm.types import SparseDistribution

GATHERED_NUMBERS = 2**24
"""Most numbers of output weights that are gathered at once."""
LEAST_REST = 1e-7
"""Least probability of all other ids together under the model, which is 1 less a sum in fp32."""


def sparse_target(
    losses: RowLosses, kept_K: Tensor, distribution: SparseDistribution, formula: Divergence, weight: float
) -> SparseTarget:
    """Compute the divergence of the kept rows and its part in their gradients. Collective over the vocabulary's parts.

    Args:
        weight: of the divergence in the loss.
    """
    id_Kk = distribution.id_Nk[kept_K]
    log_sum_K = losses.rows.sum_N[kept_K].log()
    logit_Kk = losses.part.sum_in_rank_order(
        cap_(
            _logits(losses.hidden_Nd.detach()[kept_K], losses.weight_Vd.detach(), id_Kk - losses.part.start),
            losses.part.softcap,
        )
    )
    log_p_Kk = logit_Kk - losses.rows.max_N[kept_K][:, None] - log_sum_K[:, None]
    log_q_Kk = distribution.log_probability_Nk[kept_K].to(log_p_Kk.dtype)
    tables = log_p_Kk, log_q_Kk
    if distribution.log_rest_N is not None:
        rest_K = (1 - log_p_Kk.double().exp().sum(1)).clamp(min=LEAST_REST)
        log_rest_K = distribution.log_rest_N[kept_K].to(log_p_Kk.dtype)
        tables = (
            torch.cat([log_p_Kk, rest_K.log().to(log_p_Kk.dtype)[:, None]], dim=1),
            torch.cat([log_q_Kk, log_rest_K[:, None]], dim=1),
        )
    moments_2K = formula.moments(*tables)
    num_ids = id_Kk.shape[1]
    if distribution.log_rest_N is not None:
        slope_K = formula.slope(tables[0][:, num_ids:], tables[1][:, num_ids:], moments_2K).squeeze(1)
    else:  # other ids have probability 0 under the reference: only forward KL has a gradient then, p itself
        slope_K = torch.zeros_like(log_sum_K) if formula.needs_moments else torch.ones_like(log_sum_K)
    gradient_Kk = formula.gradient(log_p_Kk, log_q_Kk, moments_2K)
    divergence_K = formula.value(moments_2K)
    if distribution.entropy_N is not None:  # of a sample, its own entropy says nothing
        cross_K = -(log_q_Kk.exp() * log_p_Kk).sum(1)
        divergence_K = cross_K - distribution.entropy_N[kept_K].to(cross_K.dtype)
    return SparseTarget(
        weight=weight,
        divergence_K=divergence_K,
        slope_K=slope_K,
        local_id_Kk=id_Kk - losses.part.start,
        extra_Kk=gradient_Kk - slope_K[:, None] * log_p_Kk.exp(),
    )


def _logits(hidden_Kd: Tensor, weight_Vd: Tensor, local_id_Kk: Tensor) -> Tensor:
    """Compute the logits of each row's ids, [K, k] in fp32 (or fp64); 0 for ids that another rank holds."""
    dtype = accumulation_dtype(hidden_Kd)
    out_Kk = torch.zeros(local_id_Kk.shape, dtype=dtype, device=hidden_Kd.device)
    if not weight_Vd.shape[0]:
        return out_Kk
    inside_Kk = (local_id_Kk >= 0) & (local_id_Kk < weight_Vd.shape[0])
    rows = max(1, GATHERED_NUMBERS // max(1, local_id_Kk.shape[1] * weight_Vd.shape[1]))
    for start in range(0, len(hidden_Kd), rows):
        chunk = slice(start, start + rows)
        weight_Ckd = weight_Vd[torch.where(inside_Kk[chunk], local_id_Kk[chunk], 0)].to(dtype)
        out_Kk[chunk] = torch.bmm(weight_Ckd, hidden_Kd[chunk].to(dtype)[:, :, None]).squeeze(2)
    return out_Kk.masked_fill_(~inside_Kk, 0.0)
