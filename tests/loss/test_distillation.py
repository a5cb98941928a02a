"""Distillation on the kept rows against full tables of both models' logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.loss import LossHead, dense_distillation
from megatron_slm.loss.distillation import Distillation, distilled_sum
from megatron_slm.loss.selective_ce import row_losses, row_statistics
from megatron_slm.loss.vocab_parallel import VocabularyPart
from megatron_slm.parallel.groups import TensorParallel, create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.probabilities import Probabilities
from megatron_slm.types import DenseDistribution, Selection, SparseDistribution
from tests.loss.heads import HEADS, Problem
from tests.support.peak import Peak
from tests.support.world import run_world

CASES = [
    Distillation(divergence="kl", weight=1.0),
    Distillation(divergence="kl", weight=0.3, temperature=2.5),
    Distillation(divergence="reverse-kl", weight=0.7),
    Distillation(divergence="reverse-kl", weight=1.0, temperature=0.5),
    Distillation(divergence="jsd", weight=0.5, skew=0.1),
    Distillation(divergence="jsd", weight=0.9, skew=0.8, temperature=3.0),
]
IDS = [f"{case.divergence} a={case.weight} T={case.temperature}" for case in CASES]


def divergence(case: Distillation, log_p: Tensor, log_q: Tensor) -> Tensor:
    """From the definitions, by torch's own KL divergence of a table of targets."""

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(against, of, reduction="none", log_target=True).sum(-1)

    if case.divergence == "kl":
        return kl(log_q, log_p)
    if case.divergence == "reverse-kl":
        return kl(log_p, log_q)
    log_m = (case.skew * log_q.exp() + (1 - case.skew) * log_p.exp()).log()
    return case.skew * kl(log_q, log_m) + (1 - case.skew) * kl(log_p, log_m)


def oracle(p: Problem, teacher: Problem, case: Distillation, kept_K: Tensor, weight_K: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the mixed losses, and the divergences, from two full tables of logits."""
    logits, theirs = (x.hidden_Nd[kept_K] @ x.weight_Vd.t() for x in (p, teacher))
    losses = torch.nn.functional.cross_entropy(logits, p.label_N[kept_K], reduction="none")
    tempered = [torch.log_softmax(x / case.temperature, -1) for x in (logits, theirs.detach())]
    found = divergence(case, *tempered)
    mixed = (1 - case.weight) * losses + case.weight * case.temperature**2 * found
    return (mixed * weight_K).sum(), found


def dense(teacher: Problem, head: LossHead) -> DenseDistribution:
    hidden_Nd, weight_Vd = teacher.hidden_Nd.detach(), teacher.weight_Vd.detach()
    rows = row_statistics(hidden_Nd, weight_Vd, teacher.label_N, head=head)
    return DenseDistribution(hidden_Nd[:, None], weight_Vd, rows.max_N, rows.sum_N)


def ours(
    p: Problem, distribution: Any, case: Distillation, kept_K: Tensor, weight_K: Tensor | None, head: LossHead
) -> tuple[Tensor, Tensor]:
    head = LossHead(variant="recompute") if case.temperature != 1 else head
    losses = row_losses(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, keep_ratio=0.6, head=head)
    return distilled_sum(losses, Selection(kept_K, weight_K), case, distribution)


def kept_rows(p: Problem) -> tuple[Tensor, Tensor]:
    kept_K = (p.valid_N & (torch.arange(len(p.label_N)) % 3 != 0)).nonzero().squeeze(1)
    return kept_K, torch.linspace(0.2, 2.0, len(kept_K), dtype=p.hidden_Nd.dtype)


@pytest.mark.parametrize("width", [5, 12, 31], ids=["narrower", "as wide", "wider"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_losses_and_gradients_of_full_tables(case: Distillation, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_distillation, "LEAST_CHUNK_ROWS", 7)
    p, teacher = Problem.random(40, 5003), Problem.random(40, 5003, seed=1, width=width)
    kept_K, weight_K = kept_rows(p)
    expected, divergences = oracle(p, teacher, case, kept_K, weight_K)
    (3 * expected).backward()
    truth = p.gradients()
    for name, head in HEADS.items():
        total, found_K = ours(p, dense(teacher, head), case, kept_K, weight_K, head)
        (3 * total).backward()
        assert abs(total.item() - expected.item()) <= 1e-10, name
        assert (found_K - divergences).abs().max() <= 1e-10, name
        assert divergences.min() > 1e-3, "nothing to distill"
        for gradient, exact in zip(p.gradients(), truth, strict=True):
            assert (gradient - exact).abs().max() <= 1e-10, name
    assert teacher.hidden_Nd.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_model_distilled_to_itself_has_no_gradient(case: Distillation, dtype: torch.dtype) -> None:
    case = Distillation(divergence=case.divergence, weight=1.0, temperature=case.temperature, skew=case.skew)
    p = Problem.random(40, 5003, dtype=dtype)
    kept_K, _ = kept_rows(p)
    for variant in ("recompute", "stash"):
        head = LossHead(variant=variant, stash_dtype="fp32")  # type: ignore[arg-type]
        total, found_K = ours(p, dense(p, head), case, kept_K, None, head)
        total.backward()
        assert found_K.abs().max() <= 1e-5
        for gradient in p.gradients():
            assert gradient.abs().max() <= 2e-6


@pytest.mark.parametrize("divergence", ["kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("variant", ["recompute", "stash"])
def test_it_takes_no_more_memory_than_cross_entropy(variant: Any, divergence: Any) -> None:
    head, peaks = LossHead(variant=variant, stash_dtype="fp32", stash_bytes=2**30), []
    teacher = Problem.random(1024, 8192, seed=1, width=64, dtype=torch.float32)
    distribution = dense(teacher, head)
    for case in (None, Distillation(divergence=divergence, weight=0.5)):
        p = Problem.random(1024, 8192, width=64, dtype=torch.float32)
        kept_K, _ = kept_rows(p)
        with Peak([p.hidden_Nd, p.weight_Vd, teacher.hidden_Nd, teacher.weight_Vd]) as memory:
            losses = row_losses(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N, keep_ratio=0.6, head=head)
            if case is None:
                total = losses.kept_sum(Selection(kept_K))
            else:
                total, _ = distilled_sum(losses, Selection(kept_K), case, distribution)
            total.backward()
        peaks.append(memory.peak_bytes)
    cross_entropy, distilled = peaks
    assert cross_entropy > 4 * len(kept_K) * 2048, "a block's logits"
    assert distilled <= 1.1 * cross_entropy


def test_a_plain_weight_of_zero_is_cross_entropy() -> None:
    p, teacher = Problem.random(40, 5003), Problem.random(40, 5003, seed=1)
    kept_K, weight_K = kept_rows(p)
    case = Distillation(divergence="kl", weight=0.0)
    total, _ = ours(p, dense(teacher, LossHead()), case, kept_K, weight_K, LossHead())
    total.backward()
    found = p.gradients()
    losses = row_losses(p.hidden_Nd, p.weight_Vd, p.label_N, p.valid_N).kept_sum(Selection(kept_K, weight_K))
    losses.backward()
    assert torch.allclose(total, losses, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, p.gradients(), strict=True))


def test_nothing_kept_and_differentiated_twice() -> None:
    p, teacher = Problem.random(40, 5003), Problem.random(40, 5003, seed=1)
    case = Distillation(divergence="jsd", weight=0.5, temperature=2.0)
    none_K = torch.zeros(0, dtype=torch.int64)
    total, found_K = ours(p, dense(teacher, LossHead()), case, none_K, None, LossHead())
    total.backward(retain_graph=True)
    assert total == 0
    assert found_K.shape == (0,)
    assert all(gradient.abs().max() == 0 for gradient in p.gradients())
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def sparse(teacher: Problem, num_ids: int) -> SparseDistribution:
    log_q = torch.log_softmax(teacher.hidden_Nd.detach() @ teacher.weight_Vd.detach().t(), -1)
    top = log_q.topk(num_ids)
    rest = None if num_ids == log_q.shape[1] else (1 - top.values.exp().sum(1)).log()
    return SparseDistribution(top.indices, top.values, rest)


@pytest.mark.parametrize("case", [case for case in CASES if case.temperature == 1], ids=lambda case: case.divergence)
def test_the_largest_probabilities_and_the_rest_as_one_outcome(case: Distillation) -> None:
    p, teacher = Problem.random(40, 5003), Problem.random(40, 5003, seed=1)
    kept_K, weight_K = kept_rows(p)
    distribution = sparse(teacher, 20)
    ids = distribution.id_Nk[kept_K]
    log_p = torch.log_softmax(p.hidden_Nd[kept_K] @ p.weight_Vd.t(), -1)
    outside = torch.ones_like(log_p).scatter(1, ids, 0.0)
    reduced = torch.cat([log_p.gather(1, ids), (log_p.exp() * outside).sum(1, keepdim=True).log()], dim=1)
    theirs = torch.cat([distribution.log_probability_Nk, distribution.log_rest_N[:, None]], dim=1)[kept_K]
    losses = -log_p.gather(1, p.label_N[kept_K, None]).squeeze(1)
    expected = (((1 - case.weight) * losses + case.weight * divergence(case, reduced, theirs)) * weight_K).sum()
    expected.backward()
    truth = p.gradients()
    for name, head in HEADS.items():
        total, _ = ours(p, distribution, case, kept_K, weight_K, head)
        total.backward()
        assert abs(total.item() - expected.item()) <= 1e-10, name
        for gradient, exact in zip(p.gradients(), truth, strict=True):
            assert (gradient - exact).abs().max() <= 1e-10, name


@pytest.mark.parametrize("case", [case for case in CASES if case.temperature == 1], ids=lambda case: case.divergence)
def test_all_probabilities_are_the_distribution_itself(case: Distillation) -> None:
    p, teacher = Problem.random(20, 300), Problem.random(20, 300, seed=1)
    kept_K, weight_K = kept_rows(p)
    found = []
    for distribution in (dense(teacher, LossHead()), sparse(teacher, 300)):
        total, _ = ours(p, distribution, case, kept_K, weight_K, LossHead())
        total.backward()
        found.append((total.detach(), *p.gradients()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_a_sample_has_the_gradient_of_the_distribution_on_average() -> None:
    """The mean over all systematic samples of a token's distribution is the distribution's."""
    p, teacher, grid = Problem.random(12, 40), Problem.random(12, 40, seed=1), 500
    case, kept_K = Distillation(divergence="kl", weight=0.6), p.valid_N.nonzero().squeeze(1)
    total, _ = ours(p, dense(teacher, LossHead()), case, kept_K, None, LossHead())
    total.backward()
    truth, mean, gradients = p.gradients(), 0.0, [torch.zeros_like(x) for x in (p.hidden_Nd, p.weight_Vd)]
    log_q = torch.log_softmax(teacher.hidden_Nd.detach() @ teacher.weight_Vd.detach().t(), -1)
    entropy_bs = -(log_q.exp() * log_q).sum(1)[None]
    for number in range(grid):
        points = ((torch.arange(8) + (number + 0.5) / grid) / 8).expand(12, 8).contiguous().double()
        id_Nk = torch.searchsorted(log_q.exp().cumsum(1), points).clamp(max=39)
        distribution = Probabilities(id_Nk[None].to(torch.uint32)).distribution(entropy_bs)
        one, _ = ours(p, distribution, case, kept_K, None, LossHead())
        one.backward()
        mean += one.item() / grid
        for sums, gradient in zip(gradients, p.gradients(), strict=True):
            sums += gradient / grid
    assert mean == pytest.approx(total.item(), rel=1e-3)
    for found, exact in zip(gradients, truth, strict=True):
        assert (found - exact).abs().max() < 2e-3 * exact.abs().max()


def cut_main(size: int, vocab: int, width: int) -> list[dict[str, Tensor]]:
    """Every case over a cut vocabulary, from hidden states and from the largest probabilities."""
    dense_distillation.LEAST_CHUNK_ROWS = 7
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=size), sequence_parallel=True) if size > 1 else TensorParallel()
    rows = -(-vocab // size)  # the last rank holds fewer, and with 9 tokens on 4 ranks none at all
    start = min(tp.rank * rows, vocab)
    part = VocabularyPart(tp=tp, start=start, rows=rows)
    p, teacher = Problem.random(40, vocab), Problem.random(40, vocab, seed=1, width=width)
    weight_Vd = p.weight_Vd[start : start + rows].detach().clone().requires_grad_()
    reference_Vd, theirs_Nd = teacher.weight_Vd[start : start + rows].detach(), teacher.hidden_Nd.detach()
    of_rows = row_statistics(theirs_Nd, reference_Vd, p.label_N, part=part)
    mine_sbd = theirs_Nd[:, None].chunk(size)[tp.rank]  # this rank's positions
    distributions = [DenseDistribution(mine_sbd, reference_Vd, of_rows.max_N, of_rows.sum_N), sparse(teacher, 6)]
    kept_K, weight_K = kept_rows(p)
    found = []
    for case in CASES:
        for distribution in distributions[: 1 + (case.temperature == 1)]:
            head = LossHead(variant="recompute" if case.temperature != 1 else "predictive")
            losses = row_losses(p.hidden_Nd, weight_Vd, p.label_N, p.valid_N, part=part, head=head)
            total, divergence_K = distilled_sum(losses, Selection(kept_K, weight_K), case, distribution)
            total.backward()
            found.append({"loss": total.detach(), "divergence": divergence_K, "hidden": p.hidden_Nd.grad})
            found[-1]["weight"] = weight_Vd.grad
            p.hidden_Nd.grad = weight_Vd.grad = None
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("size", "vocab", "width"), [(2, 4999, 31), (4, 4999, 5), (4, 9, 5)])
def test_a_cut_vocabulary(size: int, vocab: int, width: int) -> None:
    """Bit-equal losses on all ranks, and the gradients of one; references wider and narrower than the model, 12."""
    (single,) = run_world(cut_main, 1, 1, vocab, width)
    ranks = run_world(cut_main, size, size, vocab, width)
    for number, alone in enumerate(single):
        for rank in ranks:
            for name in ("loss", "divergence", "hidden"):
                assert torch.equal(rank[number][name], ranks[0][number][name]), f"{name} differs between ranks"
                assert torch.allclose(rank[number][name], alone[name], rtol=0, atol=1e-10)
        weight_Vd = torch.cat([rank[number]["weight"] for rank in ranks])
        assert torch.allclose(weight_Vd, alone["weight"], rtol=0, atol=1e-10)
