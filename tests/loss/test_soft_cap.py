"""Soft-capped logits in every way of computing the loss, against full tables in fp64 and torch's autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_slm.loss import LossHead, dense_distillation
from megatron_slm.loss.class_probabilities import most_probable
from megatron_slm.loss.distillation import Distillation, distilled_sum
from megatron_slm.loss.selective_ce import WHOLE_VOCABULARY, RowLosses, row_losses, row_statistics
from megatron_slm.types import DenseDistribution, Distribution, Selection, SparseDistribution
from tests.loss.heads import HEADS, Problem
from tests.loss.test_distillation import CASES, divergence, kept_rows

CAP, TEACHERS_CAP = 1.5, 2.5
"""Logits of the problems have a deviation of 1.7, so that both bend most of them."""
PART = replace(WHOLE_VOCABULARY, softcap=CAP)


def capped(p: Problem, cap: float, rows_K: Tensor) -> Tensor:
    return cap * torch.tanh(p.hidden_Nd[rows_K] @ p.weight_Vd.t() / cap)


def losses_of(p: Problem, head: LossHead) -> RowLosses:
    half = len(p.label_N) // 2  # what is predicted to be kept, half of it right
    predict = lambda rows, tokens: torch.arange(rows.start, rows.stop) < half  # noqa: E731
    return row_losses(
        p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, predict=predict, keep_ratio=0.6, head=head, part=PART,
        with_entropy=True,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_losses_entropies_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    p = Problem.random(40, 5003, dtype=dtype)
    kept_K, weight_K = kept_rows(p)
    truth = p.in_fp64()
    everything = torch.arange(40)
    log_p_NV = capped(truth, CAP, everything).log_softmax(-1)
    expected_N = -log_p_NV.gather(1, p.label_N[:, None]).squeeze(1)
    (3 * (expected_N[kept_K] * weight_K.double()).sum()).backward()
    exact = truth.gradients()
    for name, head in HEADS.items():
        losses = losses_of(p, head)
        valid_N = p.valid_N
        assert (losses.tokens.loss_N - expected_N)[valid_N].abs().max() <= tolerance, name
        entropy_N = torch.special.entr(log_p_NV.exp()).sum(1)
        assert losses.tokens.entropy_N is not None
        assert (losses.tokens.entropy_N - entropy_N)[valid_N].abs().max() <= 10 * tolerance, name
        (3 * losses.kept_sum(Selection(kept_K, weight_K))).backward()
        for gradient, truly in zip(p.gradients(), exact, strict=True):
            assert (gradient - truly).abs().max() <= tolerance, name


def test_a_gradient_without_the_slope_would_be_seen() -> None:
    p = Problem.random(40, 5003)
    kept_K, weight_K = kept_rows(p)
    losses_of(p, LossHead()).kept_sum(Selection(kept_K, weight_K)).backward()
    right, _ = p.gradients()
    logits_NV = p.hidden_Nd @ p.weight_Vd.t()
    straight = logits_NV + (CAP * torch.tanh(logits_NV / CAP) - logits_NV).detach()
    losses = torch.nn.functional.cross_entropy(straight, p.label_N, reduction="none")
    (losses[kept_K] * weight_K).sum().backward()
    assert (right - p.gradients()[0]).abs().max() > 1e-2


SPARSE = [(case, True) for case in CASES if case.temperature == 1]
"""Stored probabilities are the reference's at temperature 1."""


@pytest.mark.parametrize(("case", "is_sparse"), [(case, False) for case in CASES] + SPARSE, ids=str)
def test_distillation_of_two_capped_models(
    case: Distillation, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own cap; a temperature divides what the caps leave."""
    monkeypatch.setattr(dense_distillation, "LEAST_CHUNK_ROWS", 7)
    p, teacher = Problem.random(40, 5003), Problem.random(40, 5003, seed=1, width=9)
    kept_K, weight_K = kept_rows(p)
    logits, theirs = capped(p, CAP, kept_K), capped(teacher, TEACHERS_CAP, torch.arange(40)).detach()
    distribution: Distribution = SparseDistribution(
        torch.arange(5003).expand(40, -1).contiguous(), theirs.log_softmax(-1)
    )
    if not is_sparse:
        weight_Vd, hidden_Nd = teacher.weight_Vd.detach(), teacher.hidden_Nd.detach()
        part = replace(PART, softcap=TEACHERS_CAP)
        rows = row_statistics(hidden_Nd, weight_Vd, teacher.label_N, part=part)
        distribution = DenseDistribution(hidden_Nd[:, None], weight_Vd, rows.max_N, rows.sum_N, TEACHERS_CAP)
    tempered = [(x / case.temperature).log_softmax(-1) for x in (logits, theirs[kept_K])]
    found = divergence(case, *tempered)
    losses = torch.nn.functional.cross_entropy(logits, p.label_N[kept_K], reduction="none")
    mixed = (1 - case.weight) * losses + case.weight * case.temperature**2 * found
    expected = (mixed * weight_K).sum()
    expected.backward()
    exact = p.gradients()
    for name, head in HEADS.items():
        chosen = head if case.temperature == 1 else LossHead(variant="recompute")
        total, found_K = distilled_sum(losses_of(p, chosen), Selection(kept_K, weight_K), case, distribution)
        total.backward()
        assert abs(total.item() - expected.item()) <= 1e-9, name
        assert (found_K - found).abs().max() <= 1e-9, name
        for gradient, truly in zip(p.gradients(), exact, strict=True):
            assert (gradient - truly).abs().max() <= 1e-9, name


def test_probabilities_that_are_stored() -> None:
    p = Problem.random(40, 5003)
    rows = row_statistics(p.hidden_Nd, p.weight_Vd, p.label_N, part=PART)
    found = most_probable(p.hidden_Nd.detach(), p.weight_Vd.detach(), rows, PART, count=20, limit=5003)
    truth = capped(p, CAP, torch.arange(40)).log_softmax(-1).topk(20)
    assert torch.equal(found.id_Nk, truth.indices)
    assert (found.log_probability_Nk - truth.values).abs().max() <= 1e-6
