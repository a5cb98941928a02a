from __future__ import annotations

import math

import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.selection.scores import _FUNCTIONS, SCORES, ScoreInputs, score_named

INPUTS = ScoreInputs(
    torch.tensor([1.0, 4.0, 2.0]), torch.tensor([0.5, 1.5, 2.5]), torch.tensor([2.0, 1.0, 0.0]),
    torch.tensor([3.0, 0.1, 0.2]), torch.tensor([0.3, 0.1, 0.2]),
)  # fmt: skip
EXPECTED = {
    "excess": [-1.0, 3.0, 2.0],
    "loss": [1.0, 4.0, 2.0],
    "-loss": [-1.0, -4.0, -2.0],
    "reference-loss": [-2.0, -1.0, 0.0],
    "reference-entropy": [-3.0, -0.1, -0.2],
    "entropy": [0.5, 1.5, 2.5],
    "relative-excess": [-0.5, 3.0, 200.0],
    "clipped-excess": [0.0, 3.0, 2.0],
    "random": [0.3, 0.1, 0.2],
}


def test_every_score_is_tested() -> None:
    assert set(EXPECTED) == set(SCORES) == set(_FUNCTIONS)


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name: str) -> None:
    assert SCORES[name].of(INPUTS).tolist() == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_score_reads_only_what_it_declares(name: str) -> None:
    """Everything else is taken away: the value stays."""
    fields = {
        "reference-loss": "reference_loss_N", "reference-entropy": "reference_entropy_N", "entropy": "entropy_N",
        "uniform": "uniform_N",
    }  # fmt: skip
    rest = INPUTS._replace(**{f: None for need, f in fields.items() if need not in SCORES[name].needs})
    assert SCORES[name].of(rest).tolist() == pytest.approx(EXPECTED[name])
    for need in SCORES[name].needs:
        with pytest.raises(AssertionError, match="the inputs it needs"):
            SCORES[name].of(rest._replace(**{fields[need]: None}))


def test_only_scores_of_the_reference_need_one() -> None:
    alone = {name for name, score in SCORES.items() if not score.needs_reference}
    assert alone == {"loss", "-loss", "entropy", "random"}


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--slm-score is 'exces': must be one of excess, .*did you mean excess\?"):
        score_named("exces")
    with pytest.raises(ConfigError, match="choose one of them"):
        score_named("zzz")


def test_nan_goes_through() -> None:
    x = INPUTS._replace(loss_N=torch.tensor([math.nan, 4.0, 2.0]))
    for name in ("excess", "loss", "-loss", "relative-excess", "clipped-excess"):
        assert SCORES[name].of(x).isnan().tolist() == [True, False, False], name
