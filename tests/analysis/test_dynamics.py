"""The classifier of token dynamics against lines fitted one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_slm.analysis import dynamics
from megatron_slm.analysis.dynamics import CLASSES, FALLING, HIGH, LOW, RISING, classify
from megatron_slm.errors import AnalysisError


def random_losses(checkpoints: int, tokens: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    start, end = generator.gamma(2.0, 1.5, (2, tokens))
    line = np.linspace(start, end, checkpoints)
    return np.abs(line + generator.normal(0, 0.5, (checkpoints, tokens))).astype(np.float32)


@pytest.mark.parametrize("positions", [None, np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 33.0])])
def test_fit_and_fluctuation_are_least_squares(positions: np.ndarray | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's polynomial fit of every token by itself; blocks smaller than the sample change nothing."""
    loss_CN = random_losses(7, 50)
    monkeypatch.setattr(dynamics, "_BLOCK", 16)
    found = classify(loss_CN, positions)
    x = np.arange(7.0) if positions is None else positions
    for n in range(50):
        slope, intercept = np.polyfit(x, loss_CN[:, n].astype(np.float64), 1)
        assert found.change_N[n] == pytest.approx(slope * (x[-1] - x[0]), rel=1e-5, abs=1e-6)
        residual = loss_CN[:, n] - (slope * x + intercept)
        assert found.fluctuation_N[n] == pytest.approx(residual.std(), rel=1e-4, abs=1e-6)


def test_the_four_classes() -> None:
    """One token of each, and two whose line moves by almost the threshold."""
    columns = {
        "falls": ([3.0, 2.0, 1.0], FALLING),
        "rises": ([1.0, 2.0, 3.0], RISING),
        "stays low": ([0.5, 0.6, 0.5], LOW),
        "stays high": ([4.0, 4.1, 4.0], HIGH),
        "falls too little": ([0.69, 0.6, 0.5], LOW),
        "rises too little": ([4.0, 4.1, 4.19], HIGH),
        "high in the middle": ([0.5, 9.0, 0.5], LOW),
    }
    loss_CN = np.array([losses for losses, _ in columns.values()], np.float32).T
    found = classify(loss_CN)
    assert found.class_N.tolist() == [wanted for _, wanted in columns.values()]
    assert found.shares == {"H->H": 2 / 7, "L->H": 1 / 7, "H->L": 1 / 7, "L->L": 3 / 7}
    assert found.most_fluctuating(1) == [6]


def test_a_last_loss_at_the_mean_is_low() -> None:
    """At most the mean of all tokens' last losses: L->L."""
    found = classify(np.full((3, 4), 2.0, np.float32))
    assert found.class_N.tolist() == [LOW] * 4
    assert found.to_json()["class_mean_loss"]["H->H"] == [None] * 3


def test_means_by_class() -> None:
    loss_CN = random_losses(5, 300, seed=1)
    found = classify(loss_CN)
    for c in range(4):
        np.testing.assert_allclose(found.class_mean_4C[c], loss_CN[:, found.class_N == c].mean(axis=1), rtol=1e-5)
    numbers = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(numbers["shares"]) == set(CLASSES)
    assert sum(numbers["shares"].values()) == pytest.approx(1)


def test_the_papers_size_in_little_memory() -> None:
    """320k tokens x 15 checkpoints: beyond the losses themselves, well below the GB that it may take."""
    import tracemalloc

    loss_CN = np.random.default_rng(0).random((15, 320_000), np.float32)
    tracemalloc.start()
    classify(loss_CN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + loss_CN.nbytes < 100e6


def test_too_few_checkpoints_and_a_wrong_order_are_refused() -> None:
    with pytest.raises(AnalysisError, match="number of checkpoints is 2: must be at least 3"):
        classify(random_losses(2, 5))
    with pytest.raises(
        AnalysisError, match=r"steps of the checkpoints is \[1.0, 3.0, 2.0\]: must be in ascending order"
    ):
        classify(random_losses(3, 5), np.array([1.0, 3.0, 2.0]))
