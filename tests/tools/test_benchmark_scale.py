"""One rank of up to 1,024, simulated: what its start may cost, whatever the size of the world."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import scale

from tests.support.world import run_world

MOST_GROUPS = 30


def simulated(case: scale.Case, folder: str) -> dict[str, Any]:
    scale.prepare_files(case, Path(folder))
    return scale.simulate(case, Path(folder))


@pytest.mark.parametrize("layout", [(8, 4, 32), (4, 8, 32)])
def test_a_rank_creates_its_own_groups_and_takes_part_in_no_other(layout: tuple[int, int, int], tmp_path: Path) -> None:
    tensor, pipeline, data = layout
    case = scale.Case(name="groups", tensor=tensor, pipeline=pipeline, data=data, rank=300)
    [record] = run_world(simulated, 1, case, str(tmp_path))
    assert record["nocolor_splits"] == 0
    assert 4 <= record["new_groups"] <= MOST_GROUPS
