"""The part of a store with distributions: a few ids of each token, most probable or sampled, and their form on disk."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_slm.reference.manifest import StoredDistribution
from megatron_slm.types import SparseDistribution

Kind = Literal["top", "sample"]


class Probabilities(NamedTuple):
    """Distributions of some samples, as they are stored."""

    id_bsk: Tensor
    """uint32 [b, s, k]: the most probable ids, the first one most; or all draws of a sample, ascending."""
    log_probability_bsk: Tensor | None = None
    """[b, s, k] in the store's dtype; None for a sample."""
    log_rest_bs: Tensor | None = None
    """Log of the other ids' probability together [b, s]; None for a sample, and where there are no others."""

    @classmethod
    def names(cls, stored: StoredDistribution) -> list[str]:
        """Names of the tensors of a shard, in the order of the fields."""
        if stored.kind == "sample":
            return ["sample_id"]
        return ["top_id", "top_log_probability", *(["top_log_rest"] if stored.has_rest else [])]

    @classmethod
    def of(cls, distribution: SparseDistribution, stored: StoredDistribution, shape: torch.Size) -> Probabilities:
        """Convert computed distributions to what is stored of them, on the CPU.

        Args:
            shape: of the micro-batch's samples, [b, s].
        """
        id_bsk = distribution.id_Nk.cpu().view(*shape, -1).to(torch.uint32)
        if stored.kind == "sample":
            return cls(id_bsk)
        dtype: torch.dtype = getattr(torch, stored.dtype)
        log_rest_bs = None
        if stored.has_rest:
            assert distribution.log_rest_N is not None, "the k most probable ids leave a rest"
            log_rest_bs = distribution.log_rest_N.cpu().view(shape).to(dtype)
        return cls(id_bsk, distribution.log_probability_Nk.cpu().view(*shape, -1).to(dtype), log_rest_bs)

    def distribution(self, entropy_bs: Tensor | None) -> SparseDistribution:
        """Return the distributions of all positions, fp32; their probabilities sum to 1 whatever the stored dtype.

        Args:
            entropy_bs: of the reference's predictions; needed for a sample.
        """
        id_Nk = self.id_bsk.flatten(0, 1).to(torch.int64)
        if self.log_probability_bsk is None:
            assert entropy_bs is not None, "a sample is stored with entropies"
            return SparseDistribution(*_counted(id_Nk), entropy_N=entropy_bs.flatten())
        log_q_Nk = self.log_probability_bsk.flatten(0, 1).float()
        if self.log_rest_bs is None:
            return SparseDistribution(id_Nk, torch.log_softmax(log_q_Nk, dim=1))
        log_rest_N = self.log_rest_bs.flatten().float()
        all_Nk1 = torch.log_softmax(torch.cat([log_q_Nk, log_rest_N[:, None]], dim=1), dim=1)
        return SparseDistribution(id_Nk, all_Nk1[:, :-1], all_Nk1[:, -1])


def _counted(id_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct ids and the logarithms of their shares of a row's ascending draws; -infinity where unused."""
    num_draws = id_Nk.shape[1]
    is_first_Nk = torch.ones_like(id_Nk, dtype=torch.bool)
    is_first_Nk[:, 1:] = id_Nk[:, 1:] != id_Nk[:, :-1]
    place_Nk = is_first_Nk.cumsum(1) - 1
    count_Nk = torch.zeros(id_Nk.shape).scatter_add_(1, place_Nk, torch.ones(id_Nk.shape))
    distinct_Nk = torch.zeros_like(id_Nk).scatter_(1, place_Nk, id_Nk)
    return distinct_Nk, count_Nk.log() - math.log(num_draws)
