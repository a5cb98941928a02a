"""Statistics of each row in the forward pass: a handful of numbers that give its loss and entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.loss.blocks import accumulation_dtype
from megatron_slm.types import TokenStatistics


@dataclass(frozen=True)
class RowStatistics:
    """An online log-sum-exp over the vocabulary; all fp32 (or fp64) [N].

    Maximum and sum are kept apart, since folding them into one number loses digits of large logits: with an offset
    of 3000 the softmax's error is 1.2e-7 apart and 7e-5 folded.
    """

    max_N: Tensor
    """Largest logit (-inf where no vocabulary row is held here)."""
    sum_N: Tensor
    """Sum of exp(logit - max)."""
    target_N: Tensor
    """The label's logit; 0 where the label is not held here."""
    moment_N: Tensor | None
    """Sum of exp(logit - max) * (logit - max), which gives the entropy; None where no entropy is needed."""

    @classmethod
    def of_no_logits(cls, like_Nd: Tensor, *, with_entropy: bool) -> RowStatistics:
        """Return the statistics that a pass starts with and updates in place, block by block."""
        zero_N = torch.zeros(like_Nd.shape[0], dtype=accumulation_dtype(like_Nd), device=like_Nd.device)
        return cls(
            torch.full_like(zero_N, -torch.inf), zero_N, zero_N.clone(), zero_N.clone() if with_entropy else None
        )

    def rows(self, index: slice | Tensor) -> RowStatistics:
        """Return the statistics of some rows; views for a slice."""
        moment_N = self.moment_N
        return RowStatistics(
            self.max_N[index], self.sum_N[index], self.target_N[index], None if moment_N is None else moment_N[index]
        )

    @classmethod
    def concatenated(cls, parts: list[RowStatistics]) -> RowStatistics:
        """Join the statistics of one chunk of rows after the other."""
        if len(parts) == 1:
            return parts[0]
        moments = [part.moment_N for part in parts if part.moment_N is not None]
        return cls(
            torch.cat([part.max_N for part in parts]),
            torch.cat([part.sum_N for part in parts]),
            torch.cat([part.target_N for part in parts]),
            torch.cat(moments) if moments else None,
        )

    def stacked(self) -> Tensor:
        """Stack into one tensor for the ranks' exchange: [3, N], or [4, N] with the moment."""
        return torch.stack([x for x in (self.max_N, self.sum_N, self.target_N, self.moment_N) if x is not None])

    @classmethod
    def from_parts(cls, parts_PSN: Tensor) -> RowStatistics:
        """Combine the statistics over the parts of a vocabulary, each `stacked`, in a fixed order.

        The same input gives the same bits everywhere, which an all-reduce would not promise.
        """
        max_N = parts_PSN[:, 0].amax(0)
        sum_N, target_N = torch.zeros_like(max_N), torch.zeros_like(max_N)
        moment_N = torch.zeros_like(max_N) if parts_PSN.shape[1] == 4 else None
        for part_SN in parts_PSN:
            shift_N = torch.where(part_SN[1] > 0, part_SN[0] - max_N, 0.0)  # an empty part has no maximum
            shrink_N = shift_N.exp()
            sum_N += part_SN[1] * shrink_N
            target_N += part_SN[2]
            if moment_N is not None:
                moment_N += (part_SN[3] + part_SN[1] * shift_N) * shrink_N
        return cls(max_N, sum_N, target_N, moment_N)

    def token_statistics(self, valid_N: Tensor) -> TokenStatistics:
        """Compute losses, and entropies where there is a moment, in nats; 0 where not valid."""
        log_sum_N = self.sum_N.log()
        loss_N = (log_sum_N - (self.target_N - self.max_N)).masked_fill_(~valid_N, 0.0)
        if self.moment_N is None:
            return TokenStatistics(loss_N)
        return TokenStatistics(loss_N, (log_sum_N - self.moment_N / self.sum_N).masked_fill_(~valid_N, 0.0))
