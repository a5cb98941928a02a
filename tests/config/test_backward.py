"""Flags of the backward pass' rows: what is refused, and what is predicted."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_slm.config.backward import BackwardConfig, planned_share, predicted_variance
from megatron_slm.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"backward_rows": "sampled"}, "--backward-row-variance"),
        ({"backward_row_share": 0.7}, "--backward-row-share"),
        ({"backward_rows": "kept", "backward_row_share": 0.7}, "--backward-row-share"),
        ({"backward_rows": "kept", "backward_row_variance": 0.02}, "--backward-row-variance"),
        ({"backward_rows": "sampled", "backward_row_share": 0.7, "backward_row_variance": 0.02}, "--backward-row-share"),
        *[({"backward_rows": "sampled", "backward_row_share": x}, "--backward-row-share") for x in (0.0, -1, 1.1, float("nan"))],
        *[({"backward_rows": "sampled", "backward_row_variance": x}, "--backward-row-variance") for x in (0.0, 1.0, float("nan"))],
        *[
            ({"backward_rows": "sampled", "backward_row_variance": 0.02, "backward_row_share_range": x}, "--backward-row-share-range")
            for x in ([0.5], [0.8, 0.5], [0.0, 1.0], [0.5, 1.5], [0.51, 0.52], [float("nan"), 1.0], [0.2, 0.5, 1.0])
        ],
    ],
)  # fmt: skip
def test_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        BackwardConfig(**values)
    assert error.value.field == field


def test_share_1_is_exact() -> None:
    assert BackwardConfig().is_exact
    assert BackwardConfig(backward_rows="sampled", backward_row_share=1.0).is_exact
    assert not BackwardConfig(backward_rows="sampled", backward_row_variance=0.02).is_exact
    assert not BackwardConfig(backward_rows="kept").is_exact


@pytest.mark.parametrize(
    ("keep_ratio", "share", "measured"),
    [
        (0.6, 0.5, 0.192), (0.6, 0.6, 0.069), (0.6, 0.65, 0.038), (0.6, 0.7, 0.020),
        (0.3, 0.3, 0.464), (0.3, 0.4, 0.176), (0.3, 0.5, 0.060), (0.3, 0.6, 0.020),
    ],
)  # fmt: skip
def test_the_prediction_is_near_what_was_measured(keep_ratio: float, share: float, measured: float) -> None:
    assert 1 / 1.5 < predicted_variance(share, keep_ratio) / measured < 1.5
    assert predicted_variance(1.0, keep_ratio) == 0.0


def test_the_share_that_is_planned_with() -> None:
    sampled = {"backward_rows": "sampled", "backward_row_variance": 0.02}
    assert planned_share(BackwardConfig(), 0.6) == 1.0
    assert planned_share(BackwardConfig(backward_rows="kept"), 0.6) == 0.6
    assert planned_share(BackwardConfig(backward_rows="sampled", backward_row_share=0.65), 0.6) == 0.65
    assert planned_share(BackwardConfig(**sampled), 0.6) == 11 / 16
    assert planned_share(BackwardConfig(**sampled), 0.3) < 11 / 16
    assert planned_share(BackwardConfig(**sampled, backward_row_share_range=[0.8, 1.0]), 0.6) == 13 / 16
