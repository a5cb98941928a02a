"""Ways of making the same step: a loss of every token, the top share by excess loss, gradients of that share.

Each entry is a function of a `Problem` that leaves gradients on it; the first one, full logits, is what the others are
compared with. `composed` means: score under no_grad, then the library's loss on the gathered rows. `kl`: half of the
loss is the divergence from a reference as wide as the model, whose statistics are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.loss import LossHead
from megatron_slm.loss.distillation import Distillation, distilled_sum
from megatron_slm.loss.prediction import ThresholdPredictor
from megatron_slm.loss.selective_ce import row_losses, row_statistics
from megatron_slm.selection.select import top_share
from megatron_slm.types import DenseDistribution, Selection

BASELINE = "full logits + mask"
CHUNK = 512
"""Rows a chunk where another library's is composed: the fastest of 64 to 1024 here; their defaults are far slower."""


@dataclass
class Problem:
    """One micro-batch; scores are spread as a model's and a reference's are, not all alike."""

    hidden_Nd: Tensor
    weight_Vd: Tensor
    label_N: Tensor
    reference_N: Tensor
    keep: float
    predictor: ThresholdPredictor

    @classmethod
    def make(cls, size: tuple[int, int, int], keep: float, *, seed: int) -> Problem:
        """Labels are likely under the model to very different degrees, as in text."""
        num_rows, width, vocab = size
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num_rows, width, generator=g)
        weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0)) * (1.5 / width**0.5)
        label = torch.randint(vocab, (num_rows,), generator=g)
        boost = torch.rand(num_rows, 1, generator=g) * 10
        hidden += boost * weight[label] / weight[label].square().sum(1, keepdim=True)
        reference = torch.rand(num_rows, generator=g) * 6 + 2
        return cls(hidden.requires_grad_(), weight.requires_grad_(), label, reference, keep, ThresholdPredictor())

    @cached_property
    def distribution(self) -> DenseDistribution:
        """A reference as wide as the model, with the statistics that its own scoring pass leaves."""
        num_rows, width = self.hidden_Nd.shape
        g = torch.Generator().manual_seed(7)
        hidden_Nd = torch.randn(num_rows, width, generator=g)
        weight_Vd = torch.randn(self.weight_Vd.shape, generator=g) * (1.5 / width**0.5)
        rows = row_statistics(hidden_Nd, weight_Vd, self.label_N)
        return DenseDistribution(hidden_Nd[:, None], weight_Vd, rows.max_N, rows.sum_N)

    def select(self, loss_N: Tensor) -> Tensor:
        """The rows to keep, ascending."""
        return top_share(loss_N - self.reference_N, torch.ones_like(self.label_N, dtype=torch.bool), self.keep)


Step = Callable[[Problem], None]


def _full_logits(p: Problem) -> None:
    _masked(F.cross_entropy(p.hidden_Nd @ p.weight_Vd.t(), p.label_N, reduction="none"), p)


def _masked(loss_N: Tensor, p: Problem) -> None:
    mask_N = torch.zeros_like(loss_N)
    kept_K = p.select(loss_N.detach())
    mask_N[kept_K] = 1.0
    ((loss_N * mask_N).sum() / len(kept_K)).backward()


def _composed(p: Problem, score: Callable[[], Tensor], total: Callable[[Tensor, Tensor], Tensor]) -> None:
    with torch.no_grad():
        kept_K = p.select(score())
    (total(p.hidden_Nd[kept_K], p.label_N[kept_K]) / len(kept_K)).backward()


def _torch_linear(p: Problem) -> None:
    from torch.nn import LinearCrossEntropyOptions

    loss_N = F.linear_cross_entropy(
        p.hidden_Nd, p.weight_Vd, p.label_N, reduction="none", options=LinearCrossEntropyOptions()
    )
    _masked(loss_N, p)


def _torch_linear_composed(p: Problem) -> None:
    from torch.nn import LinearCrossEntropyOptions

    def loss(hidden: Tensor, label: Tensor, reduction: str) -> Tensor:
        options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
        return F.linear_cross_entropy(hidden, p.weight_Vd, label, reduction=reduction, options=options)

    _composed(p, lambda: loss(p.hidden_Nd, p.label_N, "none"), lambda h, y: loss(h, y, "sum"))


def _deepspeed_linear(p: Problem) -> None:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy as loss

    _masked(loss(p.hidden_Nd, p.weight_Vd, p.label_N, reduction="none"), p)


def _deepspeed_linear_composed(p: Problem) -> None:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy as loss

    options: dict[str, Any] = {"chunk_size": CHUNK}
    _composed(
        p,
        lambda: loss(p.hidden_Nd, p.weight_Vd, p.label_N, reduction="none", **options),
        lambda h, y: loss(h, p.weight_Vd, y, reduction="sum", **options),
    )


def _deepspeed_tiled_composed(p: Problem) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def tile(weight: Tensor, hidden: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.t(), label, reduction="sum")

    def score() -> Tensor:
        pairs = zip(p.hidden_Nd.split(CHUNK), p.label_N.split(CHUNK), strict=True)
        return torch.cat([F.cross_entropy(h @ p.weight_Vd.t(), y, reduction="none") for h, y in pairs])

    def total(hidden: Tensor, label: Tensor) -> Tensor:
        shards = math.ceil(len(label) / CHUNK)
        return TiledFusedLogitsLoss.apply(
            tile, p.weight_Vd, hidden[None], label[None], None, shards, [p.weight_Vd], "sum"
        )

    _composed(p, score, total)


def _cce(p: Problem) -> None:
    from cut_cross_entropy import linear_cross_entropy

    _masked(linear_cross_entropy(p.hidden_Nd, p.weight_Vd, p.label_N, reduction="none", impl="torch_compile"), p)


def _liger(p: Problem) -> None:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    if not torch.cuda.is_available():
        raise RuntimeError("its Triton kernels need a GPU")
    _composed(
        p,
        lambda: F.cross_entropy(p.hidden_Nd @ p.weight_Vd.t(), p.label_N, reduction="none"),
        lambda h, y: loss(h, p.weight_Vd, y, reduction="sum"),
    )


def _ours(head: LossHead, distillation: Distillation | None = None) -> Step:
    def step(p: Problem) -> None:
        valid_N = torch.ones_like(p.label_N, dtype=torch.bool)
        losses = row_losses(
            p.hidden_Nd,
            p.weight_Vd,
            p.label_N,
            valid_N,
            predict=lambda rows, tokens: p.predictor.predict(tokens.loss_N - p.reference_N[rows]),
            keep_ratio=p.keep,
            head=head,
        )
        kept_K = p.select(losses.tokens.loss_N)
        p.predictor.learn(losses.tokens.loss_N - p.reference_N, valid_N, len(kept_K))
        if distillation is None:
            loss_sum = losses.kept_sum(Selection(kept_K))
        else:
            loss_sum, _ = distilled_sum(losses, Selection(kept_K), distillation, p.distribution)
        (loss_sum / len(kept_K)).backward()

    return step


UNLIMITED = 2**40
_KL = Distillation(divergence="kl", weight=0.5)
STEPS: dict[str, Step] = {
    BASELINE: _full_logits,
    "torch linear_cross_entropy": _torch_linear,
    "torch linear_cross_entropy, composed": _torch_linear_composed,
    "DeepSpeed linear_cross_entropy": _deepspeed_linear,
    "DeepSpeed linear_cross_entropy, composed": _deepspeed_linear_composed,
    "DeepSpeed TiledFusedLogitsLoss, composed": _deepspeed_tiled_composed,
    "Apple CCE (torch.compile)": _cce,
    "Liger fused_linear_cross_entropy, composed": _liger,
    "ours: recompute": _ours(LossHead(variant="recompute")),
    "ours: stash fp32": _ours(LossHead(variant="stash", stash_dtype="fp32", stash_bytes=UNLIMITED)),
    "ours: stash bf16": _ours(LossHead(variant="stash", stash_dtype="bf16", stash_bytes=UNLIMITED)),
    "ours: predictive fp32": _ours(LossHead(variant="predictive", stash_dtype="fp32", stash_bytes=UNLIMITED)),
    "ours: predictive bf16": _ours(LossHead(variant="predictive", stash_dtype="bf16", stash_bytes=UNLIMITED)),
    "ours: auto": _ours(LossHead()),
    "kl: recompute": _ours(LossHead(variant="recompute"), _KL),
    "kl: stash fp32": _ours(LossHead(variant="stash", stash_dtype="fp32", stash_bytes=UNLIMITED), _KL),
    "kl: stash bf16": _ours(LossHead(variant="stash", stash_dtype="bf16", stash_bytes=UNLIMITED), _KL),
}
