"""Statistics of each row in the forward pass: a handful of numbers that give its loss and entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.config.scores import TOP_LOGITS
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
    top_NT: Tensor | None = None
    """The `TOP_LOGITS` largest logits, descending, [N, T]; None where their entropy is not needed."""

    @classmethod
    def of_no_logits(cls, like_Nd: Tensor, *, with_entropy: bool, with_top_entropy: bool = False) -> RowStatistics:
        """Return the statistics that a pass starts with and updates in place, block by block."""
        zero_N = torch.zeros(like_Nd.shape[0], dtype=accumulation_dtype(like_Nd), device=like_Nd.device)
        none_N = torch.full_like(zero_N, -torch.inf)
        return cls(
            none_N,
            zero_N,
            zero_N.clone(),
            zero_N.clone() if with_entropy else None,
            none_N[:, None].repeat(1, TOP_LOGITS) if with_top_entropy else None,
        )

    def fold_top(self, logits_NB: Tensor) -> None:
        """Fold a block's logits into the largest ones, in place; before the kernels overwrite the block."""
        if self.top_NT is not None:
            block_NT = logits_NB.topk(min(TOP_LOGITS, logits_NB.shape[1])).values
            self.top_NT.copy_(torch.cat([self.top_NT, block_NT.to(self.top_NT.dtype)], dim=1).topk(TOP_LOGITS).values)

    def rows(self, index: slice | Tensor) -> RowStatistics:
        """Return the statistics of some rows; views for a slice."""
        columns = (self.max_N, self.sum_N, self.target_N, self.moment_N, self.top_NT)
        return RowStatistics(*(None if x is None else x[index] for x in columns))  # type: ignore[arg-type]

    @classmethod
    def concatenated(cls, parts: list[RowStatistics]) -> RowStatistics:
        """Join the statistics of one chunk of rows after the other."""
        if len(parts) == 1:
            return parts[0]
        moments = [part.moment_N for part in parts if part.moment_N is not None]
        tops = [part.top_NT for part in parts if part.top_NT is not None]
        return cls(
            torch.cat([part.max_N for part in parts]),
            torch.cat([part.sum_N for part in parts]),
            torch.cat([part.target_N for part in parts]),
            torch.cat(moments) if moments else None,
            torch.cat(tops) if tops else None,
        )

    def stacked(self) -> Tensor:
        """Stack into one tensor for the ranks' exchange: [S, N]."""
        columns = [x for x in (self.max_N, self.sum_N, self.target_N, self.moment_N) if x is not None]
        return torch.stack([*columns, *(() if self.top_NT is None else self.top_NT.T)])

    def combined(self, parts_PSN: Tensor) -> RowStatistics:
        """Combine the statistics over the parts of a vocabulary, each `stacked` from one like this, in a fixed order.

        The same input gives the same bits everywhere, which an all-reduce would not promise.
        """
        max_N = parts_PSN[:, 0].amax(0)
        sum_N, target_N = torch.zeros_like(max_N), torch.zeros_like(max_N)
        moment_N = None if self.moment_N is None else torch.zeros_like(max_N)
        for part_SN in parts_PSN:
            shift_N = torch.where(part_SN[1] > 0, part_SN[0] - max_N, 0.0)  # an empty part has no maximum
            shrink_N = shift_N.exp()
            sum_N += part_SN[1] * shrink_N
            target_N += part_SN[2]
            if moment_N is not None:
                moment_N += (part_SN[3] + part_SN[1] * shift_N) * shrink_N
        top_NT = None
        if self.top_NT is not None:
            top_NT = parts_PSN[:, -TOP_LOGITS:].flatten(0, 1).T.topk(TOP_LOGITS).values
        return RowStatistics(max_N, sum_N, target_N, moment_N, top_NT)

    def token_statistics(self, valid_N: Tensor) -> TokenStatistics:
        """Compute losses, and entropies where their statistics are there, in nats; 0 where not valid."""
        log_sum_N = self.sum_N.log()
        loss_N = (log_sum_N - (self.target_N - self.max_N)).masked_fill_(~valid_N, 0.0)
        entropy_N = top_entropy_N = None
        if self.moment_N is not None:
            entropy_N = (log_sum_N - self.moment_N / self.sum_N).masked_fill_(~valid_N, 0.0)
        if self.top_NT is not None:
            top_entropy_N = torch.special.entr(self.top_NT.softmax(1)).sum(1).masked_fill_(~valid_N, 0.0)
        return TokenStatistics(loss_N, entropy_N=entropy_N, top_entropy_N=top_entropy_N)
