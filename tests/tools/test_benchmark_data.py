"""The preprocessing benchmark: its report's arithmetic, from given times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import data


def test_rates_and_ratios() -> None:
    timed = {
        (data.BATCH, 1, "text"): [{"cpu": 5.0, "wall": 6.0, "sha256": None}, {"cpu": 4.0, "wall": 8.0, "sha256": None}],
        (data.OURS, 1, "text"): [{"cpu": 2.0, "wall": 4.0, "sha256": "a"}],
        (data.OURS, 2, "text"): [{"cpu": 2.5, "wall": 2.0, "sha256": "a"}],
        (data.FAST, 1, "large"): [{"cpu": 1.0, "wall": 1.0, "sha256": "b"}],
        (data.OURS, 1, "large"): [{"cpu": 8.0, "wall": 8.0, "sha256": "b"}],
        (data.HALVES, 2, "large"): [{"cpu": 10.0, "wall": 5.0, "sha256": None}],
    }
    records = data._records("byte-level BPE", timed, {"text": 20_000_000, "large": 80_000_000})
    assert [record["mb_per_cpu_second"] for record in records] == [5.0, 10.0, 8.0, 80.0, 10.0, 8.0]
    assert [record["mb_per_second"] for record in records] == [pytest.approx(3.33), 5.0, 10.0, 80.0, 10.0, 16.0]
    rows = [line.split(" | ") for line in data._markdown(records, 1).splitlines() if line.startswith("| ours")]
    assert [(row[1], row[4], row[6].rstrip(" |")) for row in rows] == [
        ("1", "2.00", ""),
        ("2", "1.60", "2.00"),
        ("1", "16.00", ""),
        ("1", "2.00", ""),
        ("2", "1.60", "1.60"),
    ]


def test_corpora_that_differ_end_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_spawn", lambda job: {"cpu": 1.0, "wall": 1.0, "sha256": job["who"]})
    jobs = [(data.OURS, 1, "text"), (data.FAST, 1, "text"), (data.FAST, 1, "large")]
    with pytest.raises(RuntimeError, match="the corpora of text differ"):
        data._timed(tmp_path, "byte-level BPE", jobs, 1)


def test_the_text_is_cut_into_two_halves(tmp_path: Path) -> None:
    (tmp_path / "large.jsonl").write_text("".join(f"{'x' * size}\n" for size in (9, 9, 39, 5, 5, 5)))
    data._cut_in_two(tmp_path / "large.jsonl")
    halves = [path.read_bytes() for path in data._half_paths(tmp_path / "large.jsonl")]
    assert b"".join(halves) == (tmp_path / "large.jsonl").read_bytes()
    assert [half.count(b"\n") for half in halves] == [3, 3]
