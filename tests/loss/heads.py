"""What the tests of the loss share: random problems, the full-logit oracle, and every way of computing the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.loss import LossHead, SelectiveLoss, selective_cross_entropy
from megatron_slm.loss.selective_ce import Predict
from megatron_slm.selection.select import top_share
from megatron_slm.types import Selection, TokenStatistics

HEADS = {
    "recompute": LossHead(variant="recompute"),
    "stash": LossHead(variant="stash"),
    "stash of a part": LossHead(variant="stash", stash_bytes=30 * 5003 * 8),
    "predictive": LossHead(variant="predictive"),
    "predictive in a small budget": LossHead(variant="predictive", stash_bytes=30 * 5003 * 8),
    "auto": LossHead(),
}


@dataclass
class Problem:
    """Rows with labels, some of them masked, and losses of a reference."""

    hidden_Nd: Tensor
    weight_Vd: Tensor
    label_N: Tensor
    valid_N: Tensor
    reference_N: Tensor

    @classmethod
    def random(
        cls, num_rows: int, vocab: int, *, seed: int = 0, width: int = 12, dtype: torch.dtype = torch.float64
    ) -> Problem:
        g = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(num_rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
            torch.randn(vocab, width, generator=g, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_(),
            torch.randint(vocab, (num_rows,), generator=g),
            torch.rand(num_rows, generator=g) < 0.8,
            (torch.rand(num_rows, generator=g, dtype=torch.float64) * 6).to(
                torch.float32 if dtype == torch.bfloat16 else dtype
            ),
        )

    def on(self, device: str) -> Problem:
        """The same on another device."""
        hidden, weight = (x.detach().to(device).requires_grad_() for x in (self.hidden_Nd, self.weight_Vd))
        return Problem(hidden, weight, self.label_N.to(device), self.valid_N.to(device), self.reference_N.to(device))

    def in_fp64(self) -> Problem:
        """The same numbers, as a truth to compare with."""
        return Problem(
            self.hidden_Nd.detach().double().requires_grad_(),
            self.weight_Vd.detach().double().requires_grad_(),
            self.label_N,
            self.valid_N,
            self.reference_N.double(),
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients since the last call."""
        found = self.hidden_Nd.grad, self.weight_Vd.grad
        self.hidden_Nd.grad = self.weight_Vd.grad = None
        assert found[0] is not None
        assert found[1] is not None
        return found


def oracle(p: Problem, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits, full cross-entropy, a sort, a mask: (loss sum, kept rows, token losses)."""
    losses = torch.nn.functional.cross_entropy(p.hidden_Nd @ p.weight_Vd.t(), p.label_N, reduction="none")
    score = (losses - p.reference_N).detach()
    valid = [i for i in range(len(score)) if p.valid_N[i]]
    count = math.ceil(round(ratio * len(valid), 9))
    ranked = sorted(valid, key=lambda i: (-score[i].item(), i))
    kept = torch.tensor(sorted(ranked[:count]), dtype=torch.int64)
    return losses[kept].sum(), kept, losses.detach().masked_fill(~p.valid_N, 0.0)


def ours(p: Problem, ratio: float, head: LossHead, predict: Predict | None = None) -> SelectiveLoss:
    """Keep the top share by excess loss."""

    def select(tokens: TokenStatistics) -> Selection:
        return Selection(top_share(tokens.loss_N - p.reference_N, p.valid_N, ratio))

    return selective_cross_entropy(
        p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, select=select, predict=predict, keep_ratio=ratio, head=head
    )


def check(p: Problem, ratio: float, head: LossHead, tolerance: float, predict: Predict | None = None) -> Tensor:
    """Compare losses, kept rows and gradients with the oracle's; the kept rows."""
    result = ours(p, ratio, head, predict)
    (3.0 * result.loss_sum).backward()
    found = p.gradients()
    truth = p.in_fp64()
    expected, kept, losses = oracle(truth, ratio)
    assert result.selection.kept_K.tolist() == kept.tolist()
    assert (result.statistics.loss_N - losses).abs().max() <= tolerance
    assert abs(result.loss_sum.item() - expected.item()) <= tolerance * max(1, len(kept))
    if not len(kept):
        assert all(gradient.abs().max() == 0 for gradient in found)
        return kept
    (3.0 * expected).backward()
    for gradient, exact in zip(found, truth.gradients(), strict=True):
        assert (gradient - exact).abs().max() <= tolerance
    return kept
