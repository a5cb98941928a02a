"""The sampled backward pass against autograd's with the same weighted rows, for everything a block can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.config.recomputation import Granularity
from megatron_slm.model import row_sampling, sampled_block
from megatron_slm.model.row_sampling import Drawn
from megatron_slm.types import Documents
from tests.support.masked_rows import (
    LENGTH,
    SAMPLES,
    RecordedRows,
    architecture,
    blocks,
    gradients,
    largest_error,
    masked,
    problem,
)

DOCUMENTS = Documents(
    (5, 7, 12, 3, 9),
    torch.tensor([0, 5, 12, 24, 27, 36], dtype=torch.int32),
    torch.cat([torch.arange(n) for n in (5, 7, 12, 3, 9)]).view(SAMPLES, LENGTH),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one group": {"num_query_groups": 1},
    "as many keys": {"num_query_groups": 4},
    "biases": {"qkv_bias": True, "mlp_bias": True, "attention_output_bias": True},
    "norms of heads": {"qk_norm": True},
    "window": {"sliding_window": 4},
    "multipliers, caps and blocks without RoPE": {
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "attention_softcap": 0.8,
        "rotary_percent": 0.5,
        "unrotated_interval": 2,
        "activation": "gelu-tanh",
        "zero_centered_norms": True,
    },
    "everything": {
        "qkv_bias": True,
        "mlp_bias": True,
        "attention_output_bias": True,
        "qk_norm": True,
        "sliding_window": 5,
    },
}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_masked_dense_one(name: str, documents: Documents | None, recompute: Granularity | None) -> None:
    stack, (x, grad) = blocks(architecture(**OPTIONS[name])), problem()
    plain, exact = gradients(stack, x, grad, documents=documents)
    rows = RecordedRows(0.4)
    out, found = gradients(stack, x, grad, rows, documents=documents, recompute=recompute)
    assert torch.equal(out, plain), "the forward pass is another one"
    assert largest_error(found, masked(stack, x, grad, rows, documents=documents)) < 1e-10
    assert largest_error(found, exact) > 0.05, "nothing was sampled"
    assert [rows.measured[index][0] for index in range(3)] == [15 / 36] * 3
    for kind in ("sampled", "kept"):
        whole = gradients(stack, x, grad, RecordedRows(1.0, kind=kind), documents=documents, recompute=recompute)[1]
        if kind == "sampled":
            assert largest_error(whole, exact) < 1e-12


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", OPTIONS)
def test_kept_takes_keys_and_values_of_other_tokens_as_constants(
    name: str, documents: Documents | None, recompute: Granularity | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, (x, grad) = blocks(architecture(**OPTIONS[name])), problem()
    rows = RecordedRows(0.7, kind="kept")
    out, found = gradients(stack, x, grad, rows, documents=documents, recompute=recompute)
    kept_sb1 = (grad != 0).any(-1, keepdim=True)
    assert 0 < kept_sb1.sum() < 26 == len(rows.drawn[0].row_M), "some rows fill up"
    plain, exact = gradients(stack, x, grad, documents=documents)
    for block in stack:
        real = block.self_attn.mix

        def detached(q: Tensor, k: Tensor, v: Tensor, *, documents: Any, real: Any = real) -> Tensor:
            k, v = (torch.where(kept_sb1, part, part.detach()) for part in (k, v))
            return real(q, k, v, documents=documents)

        monkeypatch.setattr(block.self_attn, "mix", detached)
    _, expected = gradients(stack, x, grad, documents=documents)
    assert torch.equal(out, plain)
    assert largest_error(found, expected) < 1e-10
    assert largest_error(expected, exact) > 1e-3
    assert not found[0][~kept_sb1.squeeze(-1)].any(), "rows without a gradient stay so"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The forward pass bit for bit; the gradient as precise as autograd's own."""
    stack, (x, grad) = blocks(architecture(qk_norm=True), dtype=dtype), problem(dtype=dtype)
    plain, exact = gradients(stack, x, grad)
    rows = RecordedRows(0.5)
    out, found = gradients(stack, x, grad, rows)
    assert torch.equal(out, plain)
    assert {g.dtype for g in found} == {dtype}
    double, (x64, grad64) = blocks(architecture(qk_norm=True)), problem()
    limit = 3 * largest_error(exact, gradients(double, x64, grad64)[1])
    assert largest_error(found, masked(stack, x, grad, rows)) < limit


def test_few_rows_with_a_gradient_are_exact() -> None:
    """Where all rows fit, nothing is estimated, whatever fills up."""
    stack, (x, grad) = blocks(architecture(num_layers=1)), problem()
    grad[:, 1:] = 0
    rows = RecordedRows(0.5)
    assert largest_error(gradients(stack, x, grad, rows)[1], gradients(stack, x, grad)[1]) < 1e-12
    assert float(rows.measured[0][1].added) == 0.0
    assert int((rows.drawn[0].weight_M == 0).sum()) > 5


def test_a_number_that_is_not_finite_reaches_weights_and_input() -> None:
    stack, (x, grad) = blocks(architecture()), problem()
    grad[7, 1] = 0.0
    grad[7, 1, 3] = float("nan")
    for kind in ("sampled", "kept"):
        _, found = gradients(stack, x, grad, RecordedRows(0.7, kind=kind))
        assert all(bool(g.isnan().any()) for g in found[:1] + found[-4:]), kind


def test_one_backward_pass_for_a_forward_pass() -> None:
    (block, *_), (x, grad) = blocks(architecture(num_layers=1)), problem()
    out = block(x.requires_grad_(), None, RecordedRows())
    out.backward(grad, retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        out.backward(grad)


# ---- unbiased ------------------------------------------------------------------------------------------------


def mean_error(draws: int, *, share: float = 0.35) -> tuple[float, float]:
    """|mean - exact| / |exact| over draws, and what it is expected to be of an unbiased estimate."""
    stack, (x, grad) = blocks(architecture(num_layers=2)), problem()
    exact = torch.cat([g.flatten() for g in gradients(stack, x, grad)[1]])
    total, squares = torch.zeros_like(exact), 0.0
    for number in range(draws):
        found = gradients(stack, x, grad, RecordedRows(share, key=(11, number)))[1]
        flat = torch.cat([g.flatten() for g in found])
        total += flat
        squares += float((flat - exact).square().sum())
    size = float(exact.norm())
    return float((total / draws - exact).norm()) / size, (squares / draws / draws) ** 0.5 / size


@pytest.mark.parametrize("draws", [400, pytest.param(2_500, marks=pytest.mark.slow)])
def test_the_mean_over_draws_is_the_exact_gradient(draws: int) -> None:
    found, expected = mean_error(draws)
    assert 0.005 < expected < 0.1
    assert found < 1.25 * expected


@pytest.mark.parametrize("fault", ["no weights", "the draw applied twice", "residual dropped and unweighted"])
def test_faults_are_biased(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = row_sampling.systematic
    if fault == "no weights":
        monkeypatch.setattr(row_sampling, "systematic", lambda *args: _faulty(real(*args), 0))
    elif fault == "the draw applied twice":
        monkeypatch.setattr(row_sampling, "systematic", lambda *args: _faulty(real(*args), 2))
    else:
        whole = sampled_block._Pass.run

        def dropping(self: Any, dz_sbd: Tensor, rows: Any) -> Tensor:
            """The residual goes through the same draw as the branches, and through it again."""
            dx_sbd = whole(self, dz_sbd, rows)
            weight_sb1 = rows.weights(self.block.index, dz_sbd[..., 0].numel()).view(*dz_sbd.shape[:2], 1)
            return dx_sbd - dz_sbd + dz_sbd * weight_sb1**2

        monkeypatch.setattr(sampled_block._Pass, "run", dropping)
    found, expected = mean_error(150)
    assert found > 1.25 * expected


def _faulty(drawn: Drawn, power: int) -> Drawn:
    weight_M = torch.where(drawn.weight_M > 0, drawn.weight_M.clamp(min=1) ** power, 0.0)
    return Drawn(drawn.row_M, weight_M)


def test_a_wrong_weight_is_not_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the comparison above: its oracle reads the weights that were drawn, not those that were used."""
    stack, (x, grad), rows = blocks(architecture()), problem(), RecordedRows(0.4)
    real = RecordedRows.draw

    def wrong(self: RecordedRows, norm_N: Tensor, *, block: int, part: int) -> Drawn:
        return _faulty(real(self, norm_N, block=block, part=part), 2)

    monkeypatch.setattr(RecordedRows, "draw", wrong)
    found = gradients(stack, x, grad, rows)[1]
    assert largest_error(found, masked(stack, x, grad, rows)) > 1e-3


@pytest.mark.parametrize(("recompute", "count"), [("selective", 7), ("full", 1)])
def test_what_is_made_again_is_not_packed(recompute: Granularity, count: int) -> None:
    """Hooks of saved tensors, which offload them, see none of the graph that the backward pass makes again."""
    stack, (x_sbd, _) = blocks(architecture()), problem()
    packed: list[Tensor] = []
    x_sbd.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (packed.append(x), x)[1], lambda x: x):
        for block in stack:
            x_sbd = block(x_sbd, None, RecordedRows(0.5), recompute)
    assert len(packed) == count * len(stack)
