"""Selectors against the oracle of lists and sorts, and what each policy promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.selection.policies import running_threshold, score_quantiles
from megatron_slm.selection.ranking import Choice
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from tests.selection.oracle import micro_batch, naive_kept, statistics_of

LENGTH = 6
numbers = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 8, width=32))
rows = st.lists(st.tuples(numbers, numbers, st.integers(0, 5), st.integers(0, 9)), min_size=LENGTH, max_size=4 * LENGTH)


def selector(*names: str, **options: Any) -> Selector:
    return Selector(scores=tuple(SCORES[name] for name in names), **options)


def choose(chosen: Selector, loss: Any, reference: Any = None, *, valid: Any = None, label: Any = None,
           length: int = LENGTH, step: int = 0, threshold: float | None = None) -> Choice:  # fmt: skip
    batch = micro_batch(valid if valid is not None else [True] * len(loss), length, label)
    tokens = statistics_of(loss, loss)
    ranking = chosen.rank(tokens, None if reference is None else statistics_of(reference, reference), batch)
    return chosen.choose(ranking, length=length, step=step, threshold=threshold)


def kept(choice: Choice) -> list[int]:
    return choice.kept_N.nonzero().squeeze(1).tolist()


@settings(max_examples=150, deadline=None)
@given(
    rows, st.floats(0.01, 1.0), st.sampled_from(["sequence", "micro-batch", "data-parallel"]),
    st.sampled_from([None, "intersection", "union", "sum"]), st.sets(st.integers(0, 5), max_size=2), st.booleans(),
)  # fmt: skip
def test_top_k_is_the_oracles(
    table: Any, ratio: float, scope: str, combine: str | None, ids: set[int], always: bool
) -> None:
    table = table[: len(table) // LENGTH * LENGTH]
    loss, reference, label, luck = (list(column) for column in zip(*table, strict=True))
    # on a grid the standardized sums of both sides order alike unless they are equal
    loss, reference = ([round(x * 4) / 4 for x in column] for column in (loss, reference))
    valid = [x > 0 for x in luck]
    names = ["excess"] if combine is None else ["excess", "reference-loss"]
    ratios = [ratio] if combine is None else [ratio, min(1.0, ratio + 0.1)]
    weights = [1.0, 0.5][: len(names)]
    chosen = selector(
        *names, keep_ratio=ratio, scope=scope, combine=combine, combine_ratios=tuple(ratios),
        combine_weights=tuple(weights), always_keep=tuple(ids) if always else (), never_keep=() if always else tuple(ids),
    )  # fmt: skip
    choice = choose(chosen, loss, reference, valid=valid, label=label)
    ranked = [i for i in range(len(loss)) if valid[i] and (always or label[i] not in ids)]
    protected = {i for i in ranked if always and label[i] in ids}
    scores = [[x - y for x, y in zip(loss, reference, strict=True)], [-y for y in reference]][: len(names)]
    expected = naive_kept(scores, ranked, protected, LENGTH, scope, combine, ratios, weights)
    if combine == "sum":  # equal sums in exact arithmetic may differ in their last bit on one side
        assert len(kept(choice)) == len(expected)
        total = {i: float(choice.score_N[i]) for i in ranked}
        for i in set(kept(choice)) ^ set(expected):
            rivals = [j for j in ranked if j not in protected and (scope != "sequence" or i // LENGTH == j // LENGTH)]
            assert any(j != i and math.isclose(total[i], total[j], abs_tol=1e-5) for j in rivals)
    else:
        assert kept(choice) == expected
    assert float(choice.divisor()) == len(kept(choice))


@pytest.mark.parametrize("scope", ["sequence", "micro-batch", "data-parallel"])
def test_ties_go_to_the_lower_position_in_every_scope(scope: str) -> None:
    equal = choose(selector("loss", keep_ratio=0.5, scope=scope), [2.0] * 12, valid=[i != 1 for i in range(12)])
    assert kept(equal) == ([0, 2, 3, 6, 7, 8] if scope == "sequence" else [0, 2, 3, 4, 5, 6])


def test_at_least_one_token_is_kept_where_one_is_valid() -> None:
    assert kept(choose(selector("loss", keep_ratio=1e-6), [1.0, 3.0, 2.0] * 2)) == [1]
    nothing = choose(selector("loss", keep_ratio=1e-6), [1.0] * 6, valid=[False] * 6)
    assert kept(nothing) == []
    assert float(nothing.divisor()) == 0


def test_the_papers_self_reference_settings() -> None:
    """Low reference loss, low reference entropy, both, either: no number of the model's is read."""
    reference = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.1, 0.2, 0.3, 0.5, 0.4]]
    batch = micro_batch([True] * 6, 6)
    results = {}
    for combine, names in ((None, ["reference-loss"]), ("intersection", ["reference-loss", "reference-entropy"]),
                           ("union", ["reference-loss", "reference-entropy"])):  # fmt: skip
        chosen = selector(*names, keep_ratio=0.5, combine=combine, combine_ratios=(0.5, 0.5))
        assert not chosen.needs("entropy")
        ranking = chosen.rank(statistics_of([9.0, 1, 5, 2, 4, 7]), statistics_of(*reference), batch)
        results[combine] = kept(chosen.choose(ranking, length=6, step=0))
    assert results == {None: [0, 1, 2], "intersection": [1, 2], "union": [0, 1, 2, 3]}


def test_always_kept_ids_come_first_even_beyond_the_share() -> None:
    chosen = selector("loss", keep_ratio=0.34, always_keep=(7,))
    labels = [7, 1, 7, 1, 7, 1]
    assert kept(choose(chosen, [1.0, 9, 1, 8, 1, 7], label=labels)) == [0, 2, 4]
    assert kept(choose(chosen, [1.0, 9, 1, 8, 1, 7], label=[7, 1, 1, 1, 1, 1])) == [0, 1, 3]
    masked = choose(chosen, [1.0, 9, 1, 8, 1, 7], label=labels, valid=[False] + [True] * 5)
    assert kept(masked) == [2, 4], "protected, but masked by the user"


def test_never_kept_ids_leave_the_ranking() -> None:
    choice = choose(selector("loss", keep_ratio=0.5, never_keep=(1,)), [1.0, 9, 2, 8, 3, 7], label=[0, 1, 0, 1, 0, 1])
    assert kept(choice) == [2, 4]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["top-k", "threshold", "quantile", "sample", "weights"])
def test_what_is_not_finite_is_never_kept(policy: str, bad: float) -> None:
    chosen = selector("excess", policy=policy, keep_ratio=1.0 if policy == "quantile" else 0.6, threshold=-9.0)
    losses, references = [1.0, bad, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, bad, 1.0, 1.0, 1.0]
    choice = choose(chosen, losses, references)
    assert choice.finite_N.tolist() == [True, False, False, True, True, True]
    assert not {1, 2} & set(kept(choice))
    assert kept(choice)
    assert score_quantiles(choice.score_N, choice.ranked_N).isfinite().all()
    weights = choice.weight_N
    assert weights is None or (weights[choice.kept_N].isfinite().all() and weights[1] == weights[2] == 0)
    everything = choose(Selector(), losses, references)
    assert kept(everything) == [0, 3, 4, 5]


def test_threshold_keeps_what_reaches_it() -> None:
    choice = choose(selector("loss", policy="threshold", threshold=2.0), [1.0, 2.0, 3.0, 1.9, 0, 5])
    assert kept(choice) == [1, 2, 5]
    assert float(choice.divisor()) == 3
    assert kept(choose(selector("loss", policy="threshold", threshold=99.0), [1.0] * 6)) == []


def test_quantile_uses_the_threshold_of_earlier_steps_and_divides_by_the_expected_count() -> None:
    chosen = selector("loss", policy="quantile", keep_ratio=0.5, always_keep=(3,))
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert kept(choose(chosen, losses)) == [3, 4, 5], "the first step has its own quantile"
    choice = choose(chosen, losses, threshold=2.5, label=[3, 0, 0, 0, 0, 0], valid=[True] * 5 + [False])
    assert kept(choice) == [0, 2, 3, 4]
    assert float(choice.divisor()) == 1 + 0.5 * 4
    measured, count = (float(x) for x in chosen.measure(choice, 0))
    assert (measured, count) == (4.0 * 4, 4.0)  # the second of 2, 3, 4, 5


def test_the_running_threshold_is_an_average_over_steps() -> None:
    assert running_threshold(None, 12.0, 4.0, 0.9) == 3.0
    assert running_threshold(2.0, 12.0, 4.0, 0.75) == 0.75 * 2 + 0.25 * 3
    assert running_threshold(2.0, 0.0, 0.0, 0.75) == 2.0


def test_measured_thresholds_add_up_exactly_in_any_order() -> None:
    chosen = selector("loss", policy="quantile", keep_ratio=0.3)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(200):
        losses = (torch.rand(30, generator=generator) * 7.3).tolist()
        parts.append(float(chosen.measure(choose(chosen, losses), 0)[0]))
    halves = sum(parts[::2]) + sum(parts[1::2])
    assert sum(parts) == sum(reversed(parts)) == halves


def test_no_threshold_is_measured_while_the_next_step_keeps_everything() -> None:
    chosen = selector("loss", policy="quantile", keep_ratio=0.5, schedule=KeepSchedule(warmup_iters=3))
    counts = [float(chosen.measure(choose(chosen, [1.0, 2, 3, 4, 5, 6], step=step), step)[1]) for step in range(4)]
    assert counts == [0, 0, 6, 6]


def test_sampling_follows_the_softmax_of_the_scores() -> None:
    """The first of a sample is a draw from softmax(score / T): compare frequencies over many samples."""
    chosen, losses = selector("loss", policy="sample", keep_ratio=0.25, temperature=2.0, seed=3), [0.0, 1.0, 2.0, 4.0]
    batch = micro_batch([True] * 4 * 4000, 4)
    ranking = chosen.rank(statistics_of(losses * 4000), None, batch)
    per_sequence = Selector(**{**chosen.__dict__, "scope": "sequence"})
    first = per_sequence.choose(ranking, length=4, step=0).kept_N.view(4000, 4).double().mean(0)
    expected = torch.softmax(torch.tensor(losses).double() / 2.0, 0)
    assert torch.allclose(first, expected, atol=0.03)


def test_a_low_temperature_samples_the_top_and_a_sample_has_the_exact_size() -> None:
    losses = [3.0, 1.0, 2.0, 5.0, 4.0, 0.0]
    assert kept(choose(selector("loss", policy="sample", keep_ratio=0.5, temperature=1e-4), losses)) == [0, 3, 4]
    hot = choose(selector("loss", policy="sample", keep_ratio=0.5, temperature=1e4), losses)
    assert len(kept(hot)) == 3


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scope", ["sequence", "micro-batch"])
def test_soft_weights_have_mean_one_over_what_is_ranked(scope: str, floor: float) -> None:
    chosen = selector("loss", policy="weights", scope=scope, temperature=0.5, weight_floor=floor)
    losses, valid = [0.0, 1, 2, 3, 4, 5, 0, 0, 0, 9, 9, 9], [True] * 7 + [False] + [True] * 4
    choice = choose(chosen, losses, valid=valid)
    assert choice.weight_N is not None
    sets = [range(6), range(6, 12)] if scope == "sequence" else [range(12)]
    for positions in sets:
        ranked = [i for i in positions if valid[i]]
        exponentials = {i: math.exp(losses[i] / 0.5) for i in ranked}
        for i in ranked:
            softmax = exponentials[i] / sum(exponentials.values())
            assert float(choice.weight_N[i]) == pytest.approx(floor + (1 - floor) * len(ranked) * softmax, rel=1e-5)
        assert float(choice.weight_N[list(positions)].sum()) == pytest.approx(len(ranked), rel=1e-6)
    assert float(choice.weight_N[7]) == 0
    assert float(choice.divisor()) == 11
    empty = choose(chosen, losses, valid=[False] * 12)
    assert empty.weight_N is not None
    assert float(empty.weight_N.abs().sum()) == 0


@pytest.mark.parametrize("policy", ["top-k", "threshold", "quantile", "sample", "weights"])
def test_the_warm_up_trains_on_everything(policy: str) -> None:
    chosen = selector(
        "loss", policy=policy, keep_ratio=0.5, threshold=9.0, schedule=KeepSchedule(warmup_iters=2), never_keep=(1,)
    )
    for step, all_kept in ((0, True), (1, True), (2, False)):
        choice = choose(chosen, [1.0, 2, 3, 4, 5, 6], label=[0, 0, 0, 0, 0, 1], step=step)
        if policy != "weights":
            assert (kept(choice) == [0, 1, 2, 3, 4]) == all_kept
        assert (choice.weight_N is None) == (all_kept or policy != "weights")


def test_a_schedule_changes_each_share_of_a_combination() -> None:
    chosen = selector(
        "loss", "-loss", keep_ratio=0.5, combine="intersection", combine_ratios=(0.5, 1.0),
        schedule=KeepSchedule(kind="linear", decay_iters=2),
    )  # fmt: skip
    losses = [1.0, 2, 3, 4, 5, 6]
    assert [len(kept(choose(chosen, losses, step=step))) for step in range(4)] == [6, 5, 3, 3]


def test_rankings_join_and_come_apart() -> None:
    """Two ranks' tables, one after the other, are the ranking of the concatenated micro-batch."""
    chosen = selector("loss", "random", policy="sample", keep_ratio=0.4, combine="sum", combine_weights=(1.0, 2.0), always_keep=(2,),
                      never_keep=(3,), scope="data-parallel")  # fmt: skip
    losses, labels = [3.0, 1.0, math.nan, 5.0, 4.0, 0.0, 9.0, 9.0, 1.0, 2.0, 2.0, 2.0], [0, 1, 2, 3, 2, 5] * 2
    whole = chosen.rank(statistics_of(losses), None, micro_batch([True] * 12, 6, labels))
    halves = [
        chosen.rank(statistics_of(losses[i : i + 6]), None, micro_batch([True] * 6, 6, labels[i : i + 6], i // 6))
        for i in (0, 6)
    ]
    joined = halves[0].unpack(torch.cat([half.pack() for half in halves], dim=1))
    for one, other in zip(joined[:5], whole[:5], strict=True):
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))
    choice = chosen.choose(joined, length=6, step=0)
    parts = [choice.rows(slice(0, 6)), choice.rows(slice(6, 12))]
    assert torch.equal(torch.cat([part.kept_N for part in parts]), chosen.choose(whole, length=6, step=0).kept_N)
    assert sum(float(part.divisor()) for part in parts) == float(choice.divisor())


@pytest.mark.parametrize("policy", ["top-k", "threshold", "quantile", "sample"])
@pytest.mark.parametrize("name", ["excess", "random", "entropy"])
def test_scores_of_some_rows_are_those_of_all(policy: str, name: str) -> None:
    chosen = selector(name, policy=policy, keep_ratio=0.5, always_keep=(4,), never_keep=(5,), seed=9)
    batch = micro_batch([True] * 11 + [False], 6, [0, 4, 5] * 4)
    losses, references = torch.linspace(0, 5, 12), torch.linspace(3, 0, 12) ** 2
    tokens, reference = statistics_of(losses.tolist(), losses.tolist()), statistics_of(references.tolist())
    whole = chosen.row_scores(slice(0, 12), tokens, reference, batch)
    assert whole is not None
    assert whole.isposinf().tolist() == [False, True, False] * 4
    assert whole.isneginf().tolist() == [i % 3 == 2 for i in range(12)]
    part = chosen.row_scores(slice(4, 9), type(tokens)(tokens.loss_N[4:9], tokens.entropy_N[4:9]), reference, batch)
    assert part is not None
    assert torch.equal(part, whole[4:9])
    ranking = chosen.rank(tokens, reference, batch)
    if policy in ("top-k", "sample"):
        choice = chosen.choose(ranking, length=6, step=0)
        lowest_kept = whole[choice.kept_N].min()
        assert (whole[~choice.kept_N] <= lowest_kept).all()


def test_rows_have_no_scores_of_their_own_in_combinations() -> None:
    batch, tokens = micro_batch([True] * 6, 6), statistics_of([1.0] * 6)
    for chosen in (selector("loss", "-loss", combine="union"), selector("loss", policy="weights"), Selector()):
        assert chosen.row_scores(slice(0, 6), tokens, None, batch) is None


def test_score_quantiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    score = torch.rand(37, generator=torch.Generator().manual_seed(1))
    ranked = torch.arange(37) % 4 != 0
    expected = numpy.quantile(score[ranked].numpy().astype("float64"), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert score_quantiles(score, ranked).tolist() == pytest.approx(expected.tolist())
    assert score_quantiles(score, ranked & False).tolist() == [0.0] * 5
