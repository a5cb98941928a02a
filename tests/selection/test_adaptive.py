"""The policies `positive` and `peaking`, and protected spans, against lists and loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.selection.scores import SCORES, score_named
from megatron_slm.selection.selector import Selector
from tests.selection.oracle import micro_batch, sets_of, statistics_of, top

LENGTH = 8


def kept_by(selector: Selector, score: list[float], valid: list[bool], spans: list[float] | None = None) -> list[int]:
    """Positions kept by a selector with the score `excess`; the reference's losses are 0."""
    batch = micro_batch(valid, LENGTH)
    if spans is not None:
        batch = batch._replace(columns={"spans": torch.tensor(spans).view(-1, LENGTH)})
    ranking = selector.rank(statistics_of(score), statistics_of([0.0] * len(score)), batch)
    return selector.choose(ranking, length=LENGTH, step=0).kept_N.nonzero().squeeze(1).tolist()


def positive(score: list[float], competing: list[int], floor: float, most: float) -> set[int]:
    above = {i for i in competing if score[i] > 0}
    limit = math.ceil(round(most * len(competing), 9))
    share = max(math.ceil(round(floor * len(competing), 9)), min(limit, len(above)))
    return set(sorted(competing, key=lambda i: (-score[i], i))[:share])


def peaking(score: list[float], competing: list[int], ratio: float, share: float, length: int) -> set[int]:
    low = set(competing) - top(score, competing, set(), 1.0 - share)
    anchors = set(competing) - top(score, competing, set(), ratio)
    runs: list[list[int]] = []
    for i in sorted(low):
        if runs and i == runs[-1][-1] + 1 and i % LENGTH:
            runs[-1].append(i)
        else:
            runs.append([i])
    long = [run for run in runs if len(run) >= length]
    dropped = {i for run in long if anchors & set(run) for i in run} if long else anchors
    return set(competing) - dropped


@pytest.mark.parametrize("scope", ["sequence", "micro-batch"])
@pytest.mark.parametrize("seed", range(20))
def test_adaptive_policies_are_the_oracles(seed: int, scope: str) -> None:
    draw = random.Random(seed)
    score = [draw.choice([-2.0, -1.0, 0.0, 1.0, draw.uniform(-3, 3)]) for _ in range(3 * LENGTH)]
    valid = [draw.random() < 0.9 for _ in score]
    ratio, most = draw.choice([0.2, 0.4, 0.6]), draw.choice([0.6, 0.8, 1.0])
    share, length = draw.choice([0.6, 0.8, 1.0]), draw.choice([1, 2, 3, 5])
    common = {"scores": (SCORES["excess"],), "scope": scope}
    expected: dict[str, set[int]] = {"positive": set(), "peaking": set()}
    for positions in sets_of(len(score), LENGTH, scope):
        competing = [i for i in positions if valid[i]]
        expected["positive"] |= positive(score, competing, ratio, most)
        expected["peaking"] |= peaking(score, competing, max(ratio, 1 - share), share, length)
    adaptive = Selector(**common, policy="positive", keep_ratio=ratio, keep_most=most)
    assert kept_by(adaptive, score, valid) == sorted(expected["positive"])
    smoothed = Selector(
        **common, policy="peaking", keep_ratio=max(ratio, 1 - share), peaking_share=share, peaking_length=length
    )
    assert kept_by(smoothed, score, valid) == sorted(expected["peaking"])


def test_runs_do_not_cross_sequences_and_isolated_tokens_stay() -> None:
    """Low: 1, 5, 6, 7 and 8, 9. Only the run of three is long enough; 1 is an anchor and stays."""
    score = [9.0, -9, 9, 9, 9, -8, -7, -8, -7.0, -7, 9, 9, 9, 9, 9, 9]
    chosen = Selector(scores=(SCORES["excess"],), policy="peaking", keep_ratio=0.8, peaking_share=0.375)
    assert kept_by(chosen, score, [True] * 16) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15]
    longer = Selector(
        scores=(SCORES["excess"],), policy="peaking", keep_ratio=0.8, peaking_share=0.375, peaking_length=4
    )
    assert kept_by(longer, score, [True] * 16) == [0, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15], "the anchors alone"


@pytest.mark.parametrize("policy", ["top-k", "positive", "peaking", "threshold"])
def test_protected_spans_are_kept_and_excluded_ones_are_not(policy: str) -> None:
    score = [-1.0, -2, -3, 5, 6, 7, 8, 4]
    spans = [0.0, 0.5, 2.0, 0, 0, -1.0, 0, 0]
    chosen = Selector(scores=(SCORES["excess"],), policy=policy, keep_ratio=0.5, threshold=4.5, protected_spans="spans")
    found = kept_by(chosen, score, [True, True, False, *[True] * 5], spans)
    assert 1 in found, "protected"
    assert 2 not in found, "protected, but masked"
    assert 5 not in found, "excluded"
    assert 6 in found
    assert not chosen.keeps_a_share


def test_the_ratio_moves_against_the_kept_loss() -> None:
    chosen = Selector(scores=(SCORES["loss"],), keep_ratio=0.5, keep_adaptation=2.0, keep_least=0.25)
    first = chosen.next_adaptation([], 0, 40.0, 10.0)
    assert first == [0.5, 4.0], "nothing to compare with"
    falling = chosen.next_adaptation(first, 1, 36.0, 10.0)
    assert falling == [pytest.approx(1 - 0.5 * math.exp(0.2), abs=2**-11), 3.6]
    assert falling[0] * 1024 == round(falling[0] * 1024)
    rising = chosen.next_adaptation(falling, 2, 45.0, 10.0)
    assert rising[0] > falling[0]
    assert chosen.next_adaptation([0.3, 10.0], 3, 1.0, 1.0)[0] == 0.25, "the least"
    assert chosen.next_adaptation(rising, 3, 0.0, 0.0) == rising, "nothing kept"
    assert Selector(scores=(SCORES["loss"],)).next_adaptation([], 0, 4.0, 1.0) == []
    ranking = chosen.rank(statistics_of([1.0, 2, 3, 4]), None, micro_batch([True] * 4, 4))
    counts = [int(chosen.choose(ranking, length=4, step=0, keep_ratio=r).kept_N.sum()) for r in (None, 0.25, 0.75)]
    assert counts == [2, 1, 3]


def test_columns_that_are_missing_are_named() -> None:
    chosen = Selector(scores=(score_named("external:quality"),), keep_ratio=0.5)
    with pytest.raises(
        ConfigError, match=r"column quality of the micro-batch is missing: required by external:quality"
    ):
        kept_by(chosen, [1.0] * LENGTH, [True] * LENGTH)
