"""The benchmark of weak scaling runs, its bounds are the schedules', and collectives are not hidden by emulated compute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.tools.forked_benchmarks import benchmark, fork_ranks, run_forked, run_started

FIELDS = {
    "name", "layout", "ranks", "reference", "step_seconds", "efficiency", "spread", "bound", "efficiency_over_bound",
}  # fmt: skip


def check(records: list[dict[str, Any]], printed: str) -> dict[tuple[str, bool], dict[str, Any]]:
    assert all(set(record) == FIELDS for record in records)
    found = {(record["name"], record["reference"]): record for record in records}
    assert {name: found[name, False]["layout"] for name, _ in found} == {
        "one rank": [1, 1, 1], "D2": [1, 1, 2], "P2": [1, 2, 1], "T2": [2, 1, 1],
    }  # fmt: skip
    for reference in (False, True):
        assert found["one rank", reference]["efficiency"] == 1.0
        assert found["D2", reference]["bound"] == found["T2", reference]["bound"] == 1.0
    assert found["P2", False]["bound"] == pytest.approx(8 / 9, abs=1e-4), "two stages wait for one micro-batch's length"
    assert found["P2", True]["bound"] == pytest.approx(1.0, abs=0.01), "the reference runs in the bubble"
    for record in records:
        assert record["efficiency_over_bound"] == pytest.approx(record["efficiency"] / record["bound"], abs=2e-3)
        assert record["ranks"] == 1 if record["name"] == "one rank" else 2
    assert "| P2 | 2 |" in printed
    return found


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fork_ranks(monkeypatch)
    words = ["--quick", "--rounds", "1", "--unit-ms", "1"]
    found = check(*run_forked("weak-scaling", capsys, tmp_path / "found.json", *words))
    assert all(record["step_seconds"] >= 8 * 3e-3 for record in found.values()), "of eight micro-batches, slept out"


@pytest.mark.parametrize("waits", [False, True], ids=["synchronous", "waited for"])
def test_collectives_come_on_top_of_slept_out_computations(waits: bool) -> None:
    emulation = benchmark("emulation")

    class Work:
        def wait(self) -> None:
            time.sleep(0.03)

    def collective() -> Work | None:
        if waits:
            return Work()
        time.sleep(0.03)
        return None

    stopwatch = emulation.Stopwatch()
    counted = stopwatch._counted(collective)
    timing = emulation.slept_out(lambda work: 0.02, stopwatch)
    started = time.perf_counter()
    with timing("forward"):
        time.sleep(0.005)  # products, which are part of the length
        work = counted()
        if work is not None:
            work.wait()
    assert time.perf_counter() - started >= 0.05
    assert stopwatch.seconds >= 0.03


@pytest.mark.slow
def test_measured_efficiencies_are_near_their_bounds(tmp_path: Path) -> None:
    words = ["--quick", "--rounds", "3", "--unit-ms", "20"]
    found = check(*run_started("weak-scaling", tmp_path / "found.json", *words))
    for (name, _), record in found.items():  # tensor-parallel ranks wait for each other's processes
        assert (0.5 if name == "T2" else 0.8) < record["efficiency_over_bound"] < 1.02
    assert found["P2", False]["efficiency"] < 0.92 < found["P2", True]["efficiency"]
