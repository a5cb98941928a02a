"""The selective loss against full logits in twenty lines of PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_slm.loss import selective_ce, token_statistics, torch_backend
from megatron_slm.selection.scope import select_in_scope
from megatron_slm.types import Selection, TokenStatistics


def oracle(
    hidden_Nd: Tensor, weight_Vd: Tensor, label_N: Tensor, valid_N: Tensor, reference_N: Tensor, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits, full cross-entropy, a sort, a mask: (loss sum, kept rows, token losses)."""
    losses = torch.nn.functional.cross_entropy(hidden_Nd @ weight_Vd.t(), label_N, reduction="none")
    score = (losses - reference_N).detach()
    valid = [i for i in range(len(score)) if valid_N[i]]
    count = math.ceil(round(ratio * len(valid), 9))
    ranked = sorted(valid, key=lambda i: (-score[i].item(), i))
    kept = torch.tensor(sorted(ranked[:count]), dtype=torch.int64)
    return losses[kept].sum(), kept, losses.detach().masked_fill(~valid_N, 0.0)


def problem(num_rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_Nd": torch.randn(num_rows, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        "weight_Vd": torch.randn(vocab, 12, generator=g, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_(),
        "label_N": torch.randint(vocab, (num_rows,), generator=g),
        "valid_N": torch.rand(num_rows, generator=g) < 0.8,
        "reference_N": torch.rand(num_rows, generator=g, dtype=torch.float64).mul(6).to(dtype),
    }


def ours(p: dict[str, Tensor], ratio: float) -> selective_ce.SelectiveLoss:
    def select(tokens: TokenStatistics) -> Selection:
        score_N = tokens.loss_N - p["reference_N"]
        return Selection(select_in_scope(score_N[None], p["valid_N"][None], ratio, "micro-batch"))

    return selective_ce.selective_cross_entropy(
        p["hidden_Nd"], p["weight_Vd"], p["label_N"], p["valid_N"], select=select
    )


def check(p: dict[str, Tensor], ratio: float, tolerance: float) -> Tensor:
    result = ours(p, ratio)
    (3.0 * result.loss_sum).backward()
    gradients = [p[name].grad.clone() for name in ("hidden_Nd", "weight_Vd")]
    p["hidden_Nd"].grad = p["weight_Vd"].grad = None
    expected, kept, losses = oracle(**p, ratio=ratio)
    assert result.selection.kept_K.tolist() == kept.tolist()
    assert torch.allclose(result.statistics.loss_N, losses, rtol=0, atol=tolerance)
    assert abs(result.loss_sum.item() - expected.item()) <= tolerance * max(1, len(kept))
    if len(kept):
        (3.0 * expected).backward()
        for gradient, name in zip(gradients, ("hidden_Nd", "weight_Vd"), strict=True):
            assert (gradient - p[name].grad).abs().max() <= tolerance
    else:
        assert all(gradient.abs().max() == 0 for gradient in gradients)
    return result.selection.kept_K


@pytest.mark.parametrize("vocab", [7, 2048, 2049, 5003])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 1.0])
def test_fp64(vocab: int, ratio: float) -> None:
    check(problem(40, vocab), ratio, 1e-10)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 1.0])
def test_fp32(ratio: float) -> None:
    check(problem(64, 5003, dtype=torch.float32), ratio, 1e-5)


def test_one_token() -> None:
    p = problem(1, 7)
    p["valid_N"][:] = True
    assert check(p, 0.1, 1e-10).tolist() == [0]


def test_all_rows_masked() -> None:
    p = problem(9, 7)
    p["valid_N"][:] = False
    assert check(p, 0.6, 1e-10).tolist() == []


def test_masked_rows_get_no_gradient() -> None:
    p = problem(40, 31)
    ours(p, 1.0).loss_sum.backward()
    assert (p["hidden_Nd"].grad[~p["valid_N"]] == 0).all()
    assert (p["hidden_Nd"].grad[p["valid_N"]].abs().sum(1) > 0).all()


def test_ties_go_to_the_lower_position() -> None:
    p = problem(12, 7)
    with torch.no_grad():
        p["hidden_Nd"].copy_(p["hidden_Nd"][:1].expand_as(p["hidden_Nd"]).clone())
    p["label_N"][:] = 3
    p["reference_N"][:] = 1.0
    p["valid_N"][:] = True
    p["valid_N"][1] = False
    assert check(p, 0.5, 1e-10).tolist() == [0, 2, 3, 4, 5, 6]


def test_keeping_all_with_a_reference_is_clm_bit_for_bit() -> None:
    p = problem(50, 300, dtype=torch.float32)
    selective = ours(p, 1.0)
    selective.loss_sum.backward()
    gradients = p["hidden_Nd"].grad.clone(), p["weight_Vd"].grad.clone()
    p["hidden_Nd"].grad = p["weight_Vd"].grad = None
    plain = selective_ce.selective_cross_entropy(
        p["hidden_Nd"],
        p["weight_Vd"],
        p["label_N"],
        p["valid_N"],
        select=lambda _: Selection(p["valid_N"].nonzero().squeeze(1)),
    )
    plain.loss_sum.backward()
    assert selective.loss_sum.item() == plain.loss_sum.item()
    assert torch.equal(gradients[0], p["hidden_Nd"].grad)
    assert torch.equal(gradients[1], p["weight_Vd"].grad)


def test_large_logits_keep_their_digits() -> None:
    p = problem(20, 40)
    with torch.no_grad():
        p["hidden_Nd"].mul_(2000.0)
    check(p, 0.6, 1e-8)


def test_bf16_losses_are_fp32_and_no_worse_than_full_logits() -> None:
    p = problem(200, 900, dtype=torch.bfloat16)
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in p.items()}
    truth = oracle(**exact, ratio=1.0)[2]
    losses = token_statistics(p["hidden_Nd"], p["weight_Vd"], p["label_N"], p["valid_N"]).loss_N
    full = torch.nn.functional.cross_entropy(
        (p["hidden_Nd"] @ p["weight_Vd"].t()).float(), p["label_N"], reduction="none"
    )
    full = full.masked_fill(~p["valid_N"], 0.0)
    assert losses.dtype == torch.float32
    assert (losses - truth).abs().max() <= (full - truth).abs().max()
    assert (losses - truth).abs().max() <= 1e-4


def test_no_table_of_all_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing saved for backward is as large as one column block of the logits."""
    p = problem(64, 6000, dtype=torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours(p, 0.6)
    assert max(saved) <= p["weight_Vd"].numel()
    assert sum(saved) < 64 * torch_backend.BLOCK_SIZE + p["weight_Vd"].numel()


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = selective_ce.kept_gradients

    def faulty(*args):
        hidden, weight = real(*args)
        return hidden, weight * 1.001

    monkeypatch.setattr(selective_ce, "kept_gradients", faulty)
    with pytest.raises(AssertionError):
        check(problem(40, 300, dtype=torch.float32), 0.6, 1e-5)
