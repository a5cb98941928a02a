"""One rank of up to 1,024, simulated: what its start may cost, whatever the size of the world."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import scale

from megatron_slm.checkpoint import weights
from tests.support.cases import some_by_default
from tests.support.world import run_world

MOST_GROUPS = 30


def prepared(case: scale.Case, folder: str) -> tuple[dict[str, Any], list[Any]]:
    scale.prepare_files(case, Path(folder))
    return scale.simulate(case, Path(folder))


def simulated(case: scale.Case, folder: str, heard: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    return scale.simulate(case, Path(folder), heard)


@pytest.mark.parametrize("layout", [(8, 4, 32), (4, 8, 32)])
def test_a_rank_creates_its_own_groups_and_takes_part_in_no_other(layout: tuple[int, int, int], tmp_path: Path) -> None:
    tensor, pipeline, data = layout
    case = scale.Case(name="groups", tensor=tensor, pipeline=pipeline, data=data, rank=300)
    [(record, _)] = run_world(prepared, 1, case, str(tmp_path))
    assert record["nocolor_splits"] == 0
    assert 4 <= record["new_groups"] <= MOST_GROUPS


MOST_OPENS = 16


@pytest.mark.parametrize("data", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_a_resuming_rank_opens_its_own_files_alone(data: int, tmp_path: Path) -> None:
    case = scale.Case(name="resume", tensor=2, pipeline=2, data=data, reference=False, saved_at=(2, 2, data))
    [(first, heard)] = run_world(prepared, 1, case, str(tmp_path))
    [(record, _)] = run_world(simulated, 1, dataclasses.replace(case, rank=-3), str(tmp_path), heard)
    assert 2 <= record["file_opens"] <= MOST_OPENS
    assert first["file_opens"] <= MOST_OPENS


MOST_BYTES = 2.2
LAYERS = {
    "tensor and pipeline parallel": {"tensor": 2, "pipeline": 2, "data": 4, "rank": 3},
    "ZeRO-1": {"data": 64},
    "ZeRO-3": {"data": 64, "rank": 63, "zero_stage": 3},
    "ZeRO-3, tensor parallel": {"tensor": 8, "data": 8, "rank": 20, "zero_stage": 3},
}


def built_in_small_blocks(case: scale.Case, folder: str) -> tuple[dict[str, Any], list[Any]]:
    """Weights pass through as little memory, for models as small as these, as they do for large ones."""
    weights.READ_ELEMENTS = 2**9 if case.zero_stage == 3 else 2**12
    return prepared(case, folder)


@pytest.mark.parametrize("name", some_by_default(LAYERS, "tensor and pipeline parallel", "ZeRO-3"))
def test_layers_are_made_in_their_final_dtype_and_share(name: str, tmp_path: Path) -> None:
    """The model's and the reference's: two bytes for each of a rank's parameters, at their most."""
    case = scale.Case(name=name, hidden_size=256, **LAYERS[name])
    [(record, _)] = run_world(built_in_small_blocks, 1, case, str(tmp_path))
    assert 2.0 <= record["layer_bytes_per_parameter"] <= MOST_BYTES
