"""A micro-batch's loss, gradient and sums, against full logits in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.engine.gradients import gradient_factor
from megatron_slm.engine.skipping import skip_reason
from megatron_slm.loss.objective import Objective, OutputWeight, StepSettings
from megatron_slm.loss.sums import LossSums, SumLayout
from megatron_slm.loss.variants import LossHead
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, TokenStatistics

BATCH, LENGTH, WIDTH, VOCAB = 2, 8, 6, 30


def problem(seed: int = 0) -> tuple[Tensor, Tensor, MicroBatch, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_sbd = torch.randn(LENGTH, BATCH, WIDTH, generator=g).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).requires_grad_()
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=g)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, 3] = valid[1, 0] = False
    return (
        x_sbd,
        weight,
        MicroBatch(labels, labels, valid, torch.arange(BATCH)),
        torch.rand(BATCH * LENGTH, generator=g),
    )


def run(selector: Selector, p: Any, reference: Tensor | None) -> tuple[Tensor, LossSums, list[Tensor]]:
    x_sbd, weight, batch, _ = p
    objective = Objective(selector=selector, tp=TensorParallel())
    statistics = None if reference is None else TokenStatistics(reference)
    loss, values = objective.loss(x_sbd, OutputWeight(weight, 0, len(weight)), batch, statistics, StepSettings(step=0))
    return loss.detach(), SumLayout().unpack(values), list(torch.autograd.grad(loss, [x_sbd, weight]))


def full_losses(p: Any) -> Tensor:
    x_sbd, weight, batch, _ = p
    logits = x_sbd.transpose(0, 1).flatten(0, 1) @ weight.t()
    return torch.nn.functional.cross_entropy(logits, batch.labels_bs.flatten(), reduction="none")


@pytest.mark.parametrize(("temperature", "floor"), [(1.0, 0.0), (0.5, 0.2), (4.0, 0.0)])
def test_soft_weights_and_their_gradient(temperature: float, floor: float) -> None:
    p = problem()
    chosen = Selector(scores=(SCORES["excess"],), policy="weights", temperature=temperature, weight_floor=floor)
    loss, sums, gradients = run(chosen, p, p[3])
    losses, valid = full_losses(p), p[2].valid_bs.flatten()
    score = (losses.detach() - p[3])[valid]
    weights = floor + (1 - floor) * len(score) * torch.softmax(score / temperature, 0)
    expected = (losses[valid] * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [p[0], p[1]]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert sums.divisor == sums.kept_tokens == 14
    assert sums.excess_squares == pytest.approx(score.double().square().sum().item(), rel=1e-6)
    assert sums.weighted_loss == pytest.approx(expected.item(), rel=1e-5)
    assert sums.kept_loss == pytest.approx(losses[valid].sum().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reference_loss_that_is_not_finite_is_as_if_masked(bad: float) -> None:
    p, chosen = problem(), Selector(scores=(SCORES["excess"],), keep_ratio=0.5)
    reference = p[3].clone()
    reference[5] = reference[12] = bad
    reference[3] = bad  # not valid: nothing to count
    loss, sums, gradients = run(chosen, p, reference)
    masked = p[2].valid_bs.flatten().clone()
    masked[[5, 12]] = False
    q = (p[0], p[1], p[2]._replace(valid_bs=masked.view(BATCH, LENGTH)), p[3])
    expected, clean, clean_gradients = run(chosen, q, p[3])
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, clean_gradients, strict=True))
    assert sums.nonfinite_tokens == 2
    assert sums == LossSums(**{**clean.__dict__, "nonfinite_tokens": 2.0})


@pytest.mark.parametrize("clm", [False, True])
def test_a_token_loss_that_is_not_finite_does_not_touch_its_neighbours(clm: bool) -> None:
    p = problem()
    chosen = Selector() if clm else Selector(scores=(SCORES["loss"],), keep_ratio=0.5)
    with torch.no_grad():
        p[0][2, 1] = math.nan  # row 10
    loss, sums, gradients = run(chosen, p, None)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert sums.nonfinite_losses == 1, "the model's own, not a score"
    assert skip_reason(sums, StepSettings(step=0)) == "nonfinite-loss"
    assert (sums.nonfinite_tokens, sums.valid_tokens, sums.kept_tokens) == (1, 13, 13 if clm else 7)
    losses, valid = full_losses(p).detach(), p[2].valid_bs.flatten().clone()
    valid[10] = False
    assert sums.valid_loss == pytest.approx(losses[valid].sum().item(), rel=1e-5)
    assert not gradients[0][2, 1].any()


def test_all_masked_is_zero_of_everything() -> None:
    p = problem()
    masked = (p[0], p[1], p[2]._replace(valid_bs=torch.zeros(BATCH, LENGTH, dtype=torch.bool)), p[3])
    for chosen in (
        Selector(),
        *(Selector(scores=(SCORES["excess"],), policy=x) for x in ("top-k", "quantile", "sample", "weights")),
        Selector(
            scores=(SCORES["excess"], SCORES["loss"]), combine="sum", combine_weights=(1.0, 1.0), scope="sequence"
        ),
    ):
        loss, sums, gradients = run(chosen, masked, p[3])
        assert float(loss) == 0
        assert sums == LossSums()
        assert not any(g.any() for g in gradients)
        assert skip_reason(sums, StepSettings(step=0)) == "no-trained-token", "a gradient of zeros is none"


def test_the_divisor_of_a_step() -> None:
    sums, settings = LossSums(kept_tokens=5, divisor=4.0, ranked_tokens=9), StepSettings(step=0)
    assert gradient_factor(sums, settings, 2) == 0.5
    for bad in (LossSums(nonfinite_tokens=3), replace(sums, nonfinite_losses=1.0)):
        assert gradient_factor(bad, settings, 2) is None


def test_why_a_step_is_skipped() -> None:
    sums = LossSums(kept_tokens=5, divisor=4.0, ranked_tokens=9, valid_loss=30.0, valid_tokens=10)

    def reason(limit: float | None = None, **changes: float) -> str | None:
        return skip_reason(replace(sums, **changes), StepSettings(step=0, loss_limit=limit))

    assert reason() is None
    assert reason(nonfinite_tokens=3) is None, "scores that are not finite are left out"
    assert reason(nonfinite_tokens=3, nonfinite_losses=1) == "nonfinite-loss"
    assert reason(nonfinite_tokens=3, ranked_tokens=0, kept_tokens=0) == "nonfinite-score"
    assert reason(nonfinite_tokens=3, kept_tokens=0) == "nothing-kept", "nothing reached the threshold"
    assert reason(kept_tokens=0) == "nothing-kept"
    assert reason(kept_tokens=0, ranked_tokens=0) == "no-trained-token", "all are masked"
    assert reason(limit=3.0) is None
    assert reason(limit=2.999) == "loss-spike"


def test_the_expected_count_divides_in_quantile_selections() -> None:
    p, chosen = problem(), Selector(scores=(SCORES["loss"],), policy="quantile", keep_ratio=0.5)
    objective = Objective(selector=chosen, tp=TensorParallel())
    settings = StepSettings(step=7, score_threshold=0.0)
    _, values = objective.loss(p[0], OutputWeight(p[1], 0, len(p[1])), p[2], None, settings)
    sums = SumLayout().unpack(values)
    assert sums.kept_tokens == 14
    assert sums.divisor == 7
    losses = full_losses(p).detach()[p[2].valid_bs.flatten()].sort(descending=True).values
    assert sums.threshold / sums.threshold_tokens == pytest.approx(float(losses[6]), abs=2**-16)
    assert sums.score_p50 / sums.ranked_tokens == pytest.approx(float(losses.double().quantile(0.5)), rel=1e-6)


@pytest.mark.parametrize("rows_in_budget", [6, 1000])
def test_the_predictor_learns_from_all_rows_of_a_micro_batch(rows_in_budget: int) -> None:
    """Also where the stash is full before the last rows are scored; the results are those without a stash."""
    chosen = Selector(scores=(SCORES["loss"],), keep_ratio=0.25)
    small = LossHead(variant="predictive", stash_bytes=rows_in_budget * VOCAB * 4)
    predicting = Objective(selector=chosen, tp=TensorParallel(), head=small)
    plain = Objective(selector=chosen, tp=TensorParallel(), head=LossHead(variant="recompute"))
    for seed in range(3):
        p = problem(seed)
        found = []
        for objective in (predicting, plain):
            output, settings = OutputWeight(p[1], 0, VOCAB), StepSettings(step=0)
            loss, sums = objective.loss(p[0], output, p[2], None, settings)
            found.append([loss.detach(), sums, *torch.autograd.grad(loss, [p[0], p[1]])])
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        losses = full_losses(p).detach()
        ranked = losses[p[2].valid_bs.flatten()].sort(descending=True).values
        predicted = predicting.predictor.predict(losses)
        assert predicted is not None
        # a quarter of 14 is kept, and a band of a twentieth more
        assert sorted(losses[predicted & p[2].valid_bs.flatten()].tolist()) == sorted(ranked[:5].tolist())
