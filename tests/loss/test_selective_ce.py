"""The selective loss against full logits in twenty lines of PyTorch, in every variant."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.loss import LossHead, selective_cross_entropy, token_statistics, variants
from megatron_slm.loss import torch_backend as torch_backend_module
from megatron_slm.types import Selection, TokenStatistics
from tests.loss.heads import HEADS, Problem, check, oracle, ours


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "CHUNK_ROWS", 7)


@pytest.mark.parametrize("vocab", [7, 2048, 2049, 5003])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_fp64(head: LossHead, ratio: float, vocab: int) -> None:
    check(Problem.random(40, vocab), ratio, head, 1e-10)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_fp32(head: LossHead, ratio: float) -> None:
    check(Problem.random(64, 5003, dtype=torch.float32), ratio, head, 1e-5)


@pytest.mark.parametrize("variant", ["stash", "predictive"])
def test_a_stash_in_bf16_rounds_gradients_and_nothing_else(variant: Any) -> None:
    p = Problem.random(64, 5003, dtype=torch.float32)
    result = ours(p, 0.6, LossHead(variant=variant, stash_dtype="bf16"))
    result.loss_sum.backward()
    rounded = p.gradients()
    exact_result = ours(p, 0.6, LossHead(variant="recompute"))
    exact_result.loss_sum.backward()
    assert torch.equal(result.statistics.loss_N, exact_result.statistics.loss_N)
    assert result.loss_sum.item() == exact_result.loss_sum.item()
    for gradient, exact in zip(rounded, p.gradients(), strict=True):
        assert 1e-6 < (gradient - exact).norm() / exact.norm() < 2**-9


GUESSES = {
    "everything": lambda score_R: torch.ones_like(score_R, dtype=torch.bool),
    "nothing": lambda score_R: torch.zeros_like(score_R, dtype=torch.bool),
    "the wrong half": lambda score_R: score_R < 1.5,
    "about right": lambda score_R: score_R >= 1.4,
    "no guess": lambda score_R: None,
}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("budget_rows", [12, 40])
def test_any_prediction_gives_the_same(guess: str, budget_rows: int) -> None:
    p = Problem.random(40, 5003)
    head = LossHead(variant="predictive", stash_bytes=budget_rows * 5003 * 8)
    seen: list[slice] = []

    def predict(chunk: slice, tokens: TokenStatistics) -> Tensor | None:
        seen.append(chunk)
        return GUESSES[guess](tokens.loss_N - p.reference_N[chunk])

    check(p, 0.6, head, 1e-10, predict)
    assert seen[0] == slice(0, min(7, budget_rows // 2))
    assert all(one.stop == other.start for one, other in pairwise(seen))


def test_a_prediction_leaves_no_trace_in_the_bits() -> None:
    p = Problem.random(300, 5003, width=64, dtype=torch.float32)
    outcomes = []
    for guess in GUESSES.values():
        head = LossHead(variant="predictive", stash_dtype="bf16")
        ours(p, 0.6, head, lambda c, t, g=guess: g(t.loss_N - p.reference_N[c])).loss_sum.backward()
        outcomes.append(p.gradients())
    for hidden, weight in outcomes[1:]:
        assert torch.equal(hidden, outcomes[0][0])
        assert torch.equal(weight, outcomes[0][1])


def test_two_runs_give_the_same_bits() -> None:
    p = Problem.random(100, 5003, dtype=torch.float32)
    for head in HEADS.values():
        runs = []
        for _ in range(2):
            ours(p, 0.6, head).loss_sum.backward()
            runs.append(p.gradients())
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_weighted_tokens(head: LossHead) -> None:
    p = Problem.random(40, 5003)
    kept_K = p.valid_N.nonzero().squeeze(1)[::2]
    weight_K = torch.rand(len(kept_K), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = selective_cross_entropy(
        p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, select=lambda _: Selection(kept_K, weight_K), head=head
    )
    result.loss_sum.backward()
    found = p.gradients()
    losses = torch.nn.functional.cross_entropy(p.hidden_Nd @ p.weight_Vd.t(), p.label_N, reduction="none")
    expected = (losses[kept_K] * weight_K).sum()
    expected.backward()
    assert result.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    for gradient, exact in zip(found, p.gradients(), strict=True):
        assert (gradient - exact).abs().max() < 1e-10


def test_one_token() -> None:
    p = Problem.random(1, 7)
    p.valid_N[:] = True
    for head in HEADS.values():
        assert check(p, 0.1, head, 1e-10).tolist() == [0]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_all_rows_masked(head: LossHead) -> None:
    p = Problem.random(9, 7)
    p.valid_N[:] = False
    assert check(p, 0.6, head, 1e-10).tolist() == []


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_masked_rows_get_no_gradient(head: LossHead) -> None:
    p = Problem.random(40, 31)
    ours(p, 1.0, head).loss_sum.backward()
    hidden, _ = p.gradients()
    assert (hidden[~p.valid_N] == 0).all()
    assert (hidden[p.valid_N].abs().sum(1) > 0).all()


def test_ties_go_to_the_lower_position() -> None:
    p = Problem.random(12, 7)
    with torch.no_grad():
        p.hidden_Nd.copy_(p.hidden_Nd[:1].expand_as(p.hidden_Nd).clone())
    p.label_N[:] = 3
    p.reference_N[:] = 1.0
    p.valid_N[:] = True
    p.valid_N[1] = False
    for head in HEADS.values():
        assert check(p, 0.5, head, 1e-10).tolist() == [0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_keeping_all_with_a_reference_is_clm_bit_for_bit(head: LossHead) -> None:
    p = Problem.random(50, 300, dtype=torch.float32)
    selective = ours(p, 1.0, head)
    selective.loss_sum.backward()
    gradients = p.gradients()
    everything = Selection(p.valid_N.nonzero().squeeze(1))
    plain = selective_cross_entropy(
        p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, select=lambda _: everything, head=head
    )
    plain.loss_sum.backward()
    assert selective.loss_sum.item() == plain.loss_sum.item()
    for one, other in zip(gradients, p.gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_large_logits_keep_their_digits(head: LossHead) -> None:
    p = Problem.random(20, 40)
    with torch.no_grad():
        p.hidden_Nd.mul_(2000.0)
    check(p, 0.6, head, 1e-8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(head: LossHead, bad: float) -> None:
    p = Problem.random(40, 5003)
    p.valid_N[:] = True
    clean = ours(p, 1.0, head).statistics.loss_N
    with torch.no_grad():
        p.hidden_Nd[5, 3] = bad

    def select(tokens: TokenStatistics) -> Selection:
        return Selection(tokens.loss_N.isfinite().nonzero().squeeze(1))

    result = selective_cross_entropy(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, select=select, head=head)
    result.loss_sum.backward()
    hidden, weight = p.gradients()
    others = torch.arange(40) != 5
    assert not result.statistics.loss_N[5].isfinite()
    assert torch.equal(result.statistics.loss_N[others], clean[others])
    assert hidden.isfinite().all()
    assert (hidden[5] == 0).all()
    assert weight.isfinite().all()
    assert weight.abs().sum() > 0


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_bf16_is_no_worse_than_full_logits(head: LossHead) -> None:
    """Losses and gradients are at most as far from the fp64 truth as full-logit bf16 PyTorch's."""
    p = Problem.random(200, 5003, width=32, dtype=torch.bfloat16)
    result = ours(p, 0.6, head)
    result.loss_sum.backward()
    found = p.gradients()
    truth = p.in_fp64()
    expected, kept, losses = oracle(truth, 0.6)
    expected.backward()
    full = torch.nn.functional.cross_entropy((p.hidden_Nd @ p.weight_Vd.t()).float(), p.label_N, reduction="none")
    full[kept].sum().backward()
    error = (full.detach().masked_fill(~p.valid_N, 0.0) - losses).abs().max()
    assert result.statistics.loss_N.dtype == torch.float32
    assert result.selection.kept_K.tolist() == kept.tolist()
    assert (result.statistics.loss_N - losses).abs().max() <= min(1e-4, error)
    for ours_, theirs, exact in zip(found, p.gradients(), truth.gradients(), strict=True):
        assert (ours_.double() - exact).norm() <= (theirs.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropy(dtype: torch.dtype) -> None:
    p = Problem.random(40, 5003, dtype=dtype)
    statistics = token_statistics(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, with_entropy=True)
    log_p = torch.log_softmax(p.hidden_Nd.detach().double() @ p.weight_Vd.detach().double().t(), 1)
    expected = (-(log_p.exp() * log_p).sum(1)).masked_fill(~p.valid_N, 0.0)
    assert statistics.entropy_N is not None
    assert (statistics.entropy_N - expected).abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)
    assert token_statistics(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N).entropy_N is None


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come() -> None:
    p = Problem.random(40, 300)
    with torch.no_grad():
        assert ours(p, 0.6, LossHead(variant="stash")).loss_sum.item() > 0


def test_a_second_backward_pass_is_refused() -> None:
    p = Problem.random(40, 300)
    loss = ours(p, 0.6, LossHead(variant="stash")).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


FAULTS = {
    "the wrong factor": lambda kw: kw["factor_K"].mul_(1.001),
    "the label's gradient": lambda kw: kw["target_K"].mul_(1.001),
    "the label's column": lambda kw: kw["column_K"].add_(kw["column_K"] > 0),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("variant", ["recompute", "stash", "predictive"])
def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch, variant: Any, fault: str) -> None:
    real = torch_backend_module.TorchKernels.gradient

    def faulty(self: Any, x: Tensor, factor_K: Tensor, column_K: Tensor, target_K: Tensor, **kwargs: Any) -> None:
        values = {"factor_K": factor_K.clone(), "column_K": column_K.clone(), "target_K": target_K.clone()}
        FAULTS[fault](values)
        real(self, x, **values, **kwargs)

    monkeypatch.setattr(torch_backend_module.TorchKernels, "gradient", faulty)
    with pytest.raises(AssertionError):
        check(Problem.random(40, 300, dtype=torch.float32), 0.6, LossHead(variant=variant), 1e-5)
