"""Rank-side: runs whose drawn rows are written down."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_slm.model.row_sampling import BackwardRows, Drawn
from tests.support.training import train_and_report


def train_and_report_rows(values: dict[str, Any]) -> dict[str, Any]:
    """As `train_and_report`; beside it the rows and weights by (key of the micro-batch, block, part)."""
    drawn: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}
    real = BackwardRows.draw

    def draw(self: BackwardRows, norm_N: Tensor, *, block: int, part: int) -> Drawn:
        found = real(self, norm_N, block=block, part=part)
        drawn[(*self.key, block, part)] = (found.row_M.tolist(), found.weight_M.tolist())
        return found

    BackwardRows.draw = draw  # type: ignore[method-assign]
    return {**train_and_report(values), "drawn": drawn}
