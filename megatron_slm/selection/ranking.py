"""Scores and eligibility of each token, and the result of a selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """Scores and eligibility of each token."""

    score_SN: Tensor
    """fp32 [S, N]."""
    finite_N: Tensor
    """Valid, with finite losses and scores; bool [N]."""
    ranked_N: Tensor
    """Subset of `finite_N` whose ids may be kept; bool [N]."""
    always_N: Tensor
    """Subset of `ranked_N` whose ids are always kept; bool [N]."""
    noise_N: Tensor | None = None
    """Gumbel noise, fp32 [N]; only with the policy `sample`."""
    weight_N: Tensor | None = None
    """Base of each token's weight (`Weight.base`), fp32 [N]; None without one."""
    factor_N: Tensor | None = None
    """Weight of each label's id, fp32 [N]; None without a table of them."""

    def pack(self) -> Tensor:
        """Return the ranking as one fp32 table [R, N] for communication; tables may be concatenated along N."""
        masks = [self.finite_N.float(), self.ranked_N.float(), self.always_N.float()]
        return torch.stack([*self.score_SN, *masks, *(x for x in self[4:] if x is not None)])

    def unpack(self, table_RN: Tensor) -> Ranking:
        """Return the ranking of a table of rankings like this one."""
        num_scores = len(self.score_SN)
        finite_N, ranked_N, always_N, *rest = table_RN[num_scores:]
        columns = iter(rest)
        optional = [None if mine is None else next(columns) for mine in self[4:]]
        return Ranking(table_RN[:num_scores], finite_N.bool(), ranked_N.bool(), always_N.bool(), *optional)


class Choice(NamedTuple):
    """Result of the selection for each token."""

    kept_N: Tensor
    """bool [N]."""
    score_N: Tensor
    """The ranked score (the first of several, unless summed), fp32 [N]."""
    finite_N: Tensor
    """Same as in `Ranking`, like the next two."""
    ranked_N: Tensor
    always_N: Tensor
    weight_N: Tensor | None = None
    """Factor of each kept loss, fp32 [N]; None means 1 for all."""
    expected_ratio: float | None = None
    """Average share kept, where losses are divided by an expected count and not the micro-batch's own."""

    def rows(self, rows: slice | Tensor) -> Choice:
        """Return the choice for some of the tokens, such as one rank's."""
        tensors = [x[rows] if isinstance(x, Tensor) else x for x in self]
        return Choice(*tensors)  # type: ignore[arg-type]

    def divisor(self) -> Tensor:
        """Return the divisor of the loss sum, fp64 []: the number of kept tokens, or its expectation.

        Soft weights have mean 1, so their sum is the number of tokens.
        """
        if self.expected_ratio is None:
            return self.kept_N.sum().double()
        ordinary = (self.ranked_N & ~self.always_N).sum()
        return self.always_N.sum() + self.expected_ratio * ordinary.double()
