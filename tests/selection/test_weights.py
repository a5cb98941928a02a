"""Weights of kept tokens: the losses of other programs as figures, formulas in plain Python, and combinations."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from megatron_slm.config.weights import WEIGHT_DEFINITIONS
from megatron_slm.errors import ConfigError
from megatron_slm.loss import selective_cross_entropy
from megatron_slm.selection.ranking import Choice
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from megatron_slm.selection.token_weights import frequency_weights, read_token_weights, write_token_weights
from megatron_slm.selection.weights import _BASES, WEIGHTS, weight_named
from megatron_slm.types import Selection, TokenStatistics
from tests.selection.oracle import micro_batch, statistics_of

ROWS, VOCABULARY, LABELS = 6, 32, [3, 17, 0, 31, 8, 20]
LOGITS = [
    [3.0 * math.sin(1 + 7.3 * i + 1.7 * j) + 0.25 * math.cos(0.9 * i * j) for j in range(VOCABULARY)]
    for i in range(ROWS)
]


def log_softmax(row: list[float]) -> list[float]:
    log_sum = math.log(math.fsum(math.exp(x) for x in row))
    return [x - log_sum for x in row]


def entropy(row: list[float]) -> float:
    return -math.fsum(math.exp(x) * x for x in log_softmax(row))


LOSS = [-log_softmax(row)[label] for row, label in zip(LOGITS, LABELS, strict=True)]


def train(selector: Selector) -> tuple[torch.Tensor, Choice, torch.Tensor]:
    """The loss sum of the rows above, its choice, and its gradient by the logits."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    batch, choices = micro_batch([True] * ROWS, ROWS, LABELS), []

    def select(tokens: TokenStatistics) -> Selection:
        choices.append(selector.choose(selector.rank(tokens, None, batch), length=ROWS, step=0))
        kept_K = choices[0].kept_N.nonzero().squeeze(1)
        return Selection(kept_K, choices[0].weight_N[kept_K])

    loss = selective_cross_entropy(
        logits, torch.eye(VOCABULARY, dtype=torch.float64), torch.tensor(LABELS), torch.ones(ROWS, dtype=torch.bool),
        select=select, with_entropy=selector.needs("entropy"), with_top_entropy=selector.needs("top-entropy"),
    )  # fmt: skip
    return loss.loss_sum, choices[0], torch.autograd.grad(loss.loss_sum, logits)[0]


def weighting(name: str, **options: Any) -> Selector:
    return Selector(policy="weights", weight=weight_named(name), **options)


FIGURES: dict[str, tuple[dict[str, Any], float, float]] = {
    # the loss on these rows of TRL (loss_type dft), LLaMA-Factory (use_dft_loss), ms-swift (enable_dft_loss) and Liger
    # (use_token_scaling): the sum of p * loss, divided by the rows
    "dft": ({}, 0.048214184009440976, 1.0),
    # LLaMA-Factory (use_eaft_loss, eaft_alpha 1 and 2) divides the entropy of the top 20 by 3.0
    "eaft": ({}, 4.311882474979316, 3.0 / math.log(20)),
    "eaft squared": ({"weight_power": 2.0}, 3.6778652909201157, (3.0 / math.log(20)) ** 2),
    # axolotl (use_eaft) does not divide it
    "eaft axolotl": ({}, 12.935647424937947, 1.0 / math.log(20)),
    "focal": ({}, 4.961538789492344, 1.0),
    # the authors' trainer: (1 + H)^gamma over its mean
    "mile": ({}, 5.054570422390364, 1.0),
    "mile squared": ({"weight_power": 2.0}, 5.052393718983207, 1.0),
    # no code of TALR's authors is public: the paper's exp(-L / T) over its mean, with T the mean loss of the one
    # sequence, and with T = 3 and a least weight of 0.3; both in 40 digits, as the two that follow
    "talr": ({}, 4.767219408654789, 1.0),
    "talr floor": ({"temperature": 3.0, "weight_floor": 0.3}, 4.984882888055542, 1.0),
    # a Gibbs distribution over the losses, and at temperature 2 with a tenth of it spread evenly
    "gibbs": ({"scores": (SCORES["loss"],)}, 6.097788083442016, 1.0),
    "gibbs floor": (
        {"scores": (SCORES["loss"],), "temperature": 2.0, "weight_floor": 0.1}, 5.616981406779333, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIGURES)
def test_the_loss_is_that_of_other_programs(case: str) -> None:
    options, figure, factor = FIGURES[case]
    loss_sum, choice, _ = train(weighting(case.split()[0], **options))
    assert float(loss_sum.detach() / choice.divisor()) == pytest.approx(figure * factor, rel=2e-7)


FORMULAS: dict[str, list[float]] = {
    "dft": [math.exp(-x) for x in LOSS],
    "eaft": [entropy(sorted(row)[-20:]) / math.log(20) for row in LOGITS],
    "focal": [(1 - math.exp(-x)) ** 2 for x in LOSS],
    "mile": [1 + entropy(row) for row in LOGITS],
    "talr": [math.exp(-x / statistics.fmean(LOSS)) for x in LOSS],
    "gibbs": [math.exp(x) for x in LOSS],
}


def test_every_weight_is_tested() -> None:
    assert set(FORMULAS) == {case.split()[0] for case in FIGURES} == set(WEIGHTS) == set(_BASES)


@pytest.mark.parametrize("normalization", ["mean", "none", None])
@pytest.mark.parametrize("name", FORMULAS)
def test_weights_and_their_gradient(name: str, normalization: Any) -> None:
    if name == "gibbs" and normalization == "none":
        return
    expected = FORMULAS[name]
    if (normalization or WEIGHT_DEFINITIONS[name].normalization) == "mean":
        expected = [w / statistics.fmean(expected) for w in expected]
    scores = (SCORES["loss"],) if name == "gibbs" else ()
    loss_sum, choice, gradient = train(weighting(name, scores=scores, weight_normalization=normalization))
    assert choice.weight_N.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(loss_sum) == pytest.approx(math.fsum(w * x for w, x in zip(expected, LOSS, strict=True)), rel=1e-6)
    for i, row in enumerate(LOGITS):  # weights carry no gradient: w (p - 1) and w p
        p = [math.exp(x) for x in log_softmax(row)]
        p[LABELS[i]] -= 1
        assert gradient[i].tolist() == pytest.approx([expected[i] * x for x in p], rel=1e-5, abs=1e-8)


def test_talrs_temperature_is_the_median_of_the_sequences() -> None:
    losses = [1.0, 3.0, 2.0, 2.0, 9.0, 9.0]
    batch = micro_batch([True] * 5 + [False], 2)
    for scope, temperatures in (("micro-batch", [2.0] * 3), ("sequence", [2.0, 2.0, 9.0])):
        chosen = weighting("talr", scope=scope, weight_normalization="none", weight_floor=0.05)
        found = chosen.choose(chosen.rank(statistics_of(losses), None, batch), length=2, step=0)
        wanted = [max(0.05, math.exp(-x / temperatures[i // 2])) for i, x in enumerate(losses)]
        assert found.weight_N.tolist() == pytest.approx([*wanted[:5], 0.0])
    fixed = weighting("talr", temperature=4.0, weight_normalization="none")
    found = fixed.choose(fixed.rank(statistics_of(losses), None, batch), length=2, step=0)
    assert found.weight_N[:2].tolist() == pytest.approx([math.exp(-0.25), math.exp(-0.75)])


@pytest.mark.parametrize("scope", ["sequence", "micro-batch"])
@pytest.mark.parametrize("policy", ["top-k", "positive", "sample", "peaking"])
def test_a_selection_is_weighted_and_not_changed(policy: str, scope: str) -> None:
    """Keep by excess, weight the kept by p with mean 1 in each scope; the others have weight 0."""
    losses = [0.5, 2.0, 4.0, 1.0, 3.0, 0.1, 6.0, 0.7, 2.5, 0.2, 5.0, 1.5]
    reference = [1.0] * 12
    batch = micro_batch([True] * 12, 6)
    common: dict[str, Any] = {"scores": (SCORES["excess"],), "keep_ratio": 0.5, "policy": policy, "scope": scope}
    plain, weighted = (
        Selector(**common, weight=weight, weight_normalization=normalization)
        for weight, normalization in ((None, None), (WEIGHTS["dft"], "mean"))
    )
    first, second = (
        one.choose(one.rank(statistics_of(losses), statistics_of(reference), batch), length=6, step=0)
        for one in (plain, weighted)
    )
    assert first.weight_N is None
    assert torch.equal(first.kept_N, second.kept_N)
    assert 0 < int(first.kept_N.sum()) < 12
    p = [math.exp(-x) if kept else 0.0 for x, kept in zip(losses, first.kept_N.tolist(), strict=True)]
    sets = [range(12)] if scope == "micro-batch" else [range(6), range(6, 12)]
    for positions in sets:
        kept = [i for i in positions if p[i]]
        mean = statistics.fmean(p[i] for i in kept)
        assert [float(second.weight_N[i]) for i in positions] == pytest.approx([p[i] / mean for i in positions])
    assert float(second.divisor()) == int(first.kept_N.sum())


def test_weights_by_id_multiply_the_others(tmp_path: Any) -> None:
    counts = torch.tensor([0, 4, 16, 1])
    table = frequency_weights(counts, 0.5)
    assert table.tolist() == pytest.approx([4.0, 2.0, 1.0, 4.0])
    write_token_weights(tmp_path / "table.safetensors", table)
    table = read_token_weights(str(tmp_path / "table.safetensors"), 4)
    losses, labels = [0.5, 1.0, 2.0, 3.0], [1, 2, 3, 0]
    batch = micro_batch([True] * 4, 4, labels)
    for weight, own in ((None, [1.0] * 4), (WEIGHTS["dft"], [math.exp(-x) for x in losses])):
        for normalization in ("none", "mean"):
            chosen = Selector(
                policy="weights", scores=(SCORES["loss"],), token_weight_V=table, weight=weight or WEIGHTS["dft"],
                weight_normalization=normalization,
            )  # fmt: skip
            if weight is None:
                chosen = Selector(token_weight_V=table, weight_normalization=normalization)
            found = chosen.choose(chosen.rank(statistics_of(losses), None, batch), length=4, step=0).weight_N
            expected = [w * float(table[label]) for w, label in zip(own, labels, strict=True)]
            mean = statistics.fmean(expected) if normalization == "mean" else 1.0
            assert found.tolist() == pytest.approx([x / mean for x in expected])


@pytest.mark.parametrize(
    ("weight_V", "size", "match"),
    [
        ([1.0, -1.0], 2, "weight of token 1 is -1.0: must be finite and at least 0"),
        ([1.0, math.nan], 2, "weight of token 1 is nan"),
        ([0.0, 0.0], 2, "largest weight is 0.0: must be above 0"),
        ([1.0, 1.0], 3, r"number of weights is 2: must be the vocabulary size of the run, 3"),
    ],
)
def test_unusable_tables(weight_V: list[float], size: int, match: str, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"token_weights": torch.tensor(weight_V)}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=match):
        read_token_weights(str(tmp_path / "t.safetensors"), size)
    with pytest.raises(ConfigError, match=r"must be a \.safetensors file with the tensor token_weights"):
        read_token_weights(str(tmp_path / "none.safetensors"), size)


def test_what_is_not_finite_gets_no_weight() -> None:
    chosen = weighting("mile")
    tokens = statistics_of([1.0, 2.0, 3.0], [0.5, math.nan, 0.5])
    found = chosen.choose(chosen.rank(tokens, None, micro_batch([True] * 3, 3)), length=3, step=0)
    assert found.kept_N.tolist() == [True, False, True]
    assert found.weight_N.tolist() == [1.0, 0.0, 1.0]


def test_an_unknown_weight_is_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"--slm-weight is 'dtf': must be one of dft, .*external:NAME.*did you mean dft"
    ):
        weight_named("dtf")
    with pytest.raises(ConfigError, match=r"--slm-weight is 'external:../x': must name a column"):
        weight_named("external:../x")
