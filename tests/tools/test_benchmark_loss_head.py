"""The loss head's benchmark: what it measures again, what it reports, and distillation's memory by the system's count."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import loss_head, report


def test_a_resumed_report_measures_only_the_contenders_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = loss_head.SIZES[0]
    names = loss_head._contenders(0.6, None)
    known = [_record(name, 7.0) for name in ["full logits + mask", *names] if not name.startswith("kl")]
    asked: list[list[str]] = []

    def spawn(job: dict[str, Any], malloc: dict[str, str]) -> dict[str, Any]:
        if job["what"] == "memory":
            return {"bytes": 50}
        asked.append(job["names"])
        contenders = ["full logits + mask", *job["names"]]
        times = {name: [2.0, 2.0] for name in contenders}
        return {"names": contenders, "missing": {}, "cpu": times, "wall": times}

    monkeypatch.setattr(loss_head, "_spawn", spawn)
    monkeypatch.setattr(report, "read", lambda name: list(known))
    out = tmp_path / "out.json"
    options = {"child": None, "quick": True, "resume": True, "rounds": 2, "threads": 1, "only": None, "json": str(out)}
    assert loss_head.run(argparse.Namespace(**options)) == 0
    records = {record["name"]: record["cpu_ratio"] for record in json.loads(out.read_text())}
    assert asked == [["kl: recompute", "kl: stash fp32", "kl: stash bf16"]]
    assert [records[n] for n in names] == [1.0 if n.startswith("kl") else 7.0 for n in names]
    assert records["full logits + mask"] == 7.0, f"the first baseline of {size} stays"


def _record(name: str, ratio: float) -> dict[str, Any]:
    values = {"cpu_ratio": ratio, "wall_ratio": ratio, "memory_ratio": 1.0, "spread": 0.0}
    return {"name": name, "size": list(loss_head.SIZES[0]), "keep": 0.6, **values}


def test_distillation_takes_no_more_pages_than_cross_entropy() -> None:
    cross_entropy, distilled = (_peak_bytes(name) for name in ("ours: stash fp32", "kl: stash fp32"))
    assert cross_entropy > 15e6, "most of the stash"
    assert distilled <= 1.1 * cross_entropy


def _peak_bytes(name: str) -> int:
    job = {"size": [640, 256, 16384], "keep": 0.6, "threads": 1, "what": "memory", "name": name}
    return int(loss_head._spawn(job, loss_head.RETURN)["bytes"])


BASE, CE, KL = "full logits + mask", "ours: stash bf16", "kl: stash bf16"


def records_of(size: tuple[int, ...], keep: float, memory: dict[str, int]) -> list[dict[str, Any]]:
    seconds = {BASE: [2.0, 4.0, 4.0], CE: [1.0, 3.0, 2.0], KL: [1.8, 3.2, 3.0]}
    return loss_head._records(size, keep, {"names": list(seconds), "cpu": seconds, "wall": seconds}, memory)


def test_distillation_is_compared_with_the_same_variant() -> None:
    found = records_of((2048, 1024, 32000), 0.6, {BASE: 1000, CE: 200, KL: 210})
    found += records_of((2048, 512, 128256), 0.3, {})
    assert [record["cpu_ratio"] for record in found[:3]] == [1.0, 0.5, 0.8]
    page = loss_head._markdown(found, {}, argparse.Namespace(threads=1, rounds=3, only="stash"))
    section = page.partition("## Distillation over cross-entropy")[2]
    assert "at most 1.6 of the time and 1.1 of the memory at keep 0.6" in section
    rows = [line for line in section.splitlines() if line.startswith("| stash")]
    assert rows == [
        "| stash bf16 | 32,000 | 0.6 | 1.60 | 1.05 |",
        "| stash bf16 | 128,256 | 0.3 | 1.60 | not measured |",
    ]


def test_without_distillation_there_is_no_such_section() -> None:
    found = [record for record in records_of((2048, 1024, 32000), 0.6, {}) if record["name"] != KL]
    assert "Distillation" not in loss_head._markdown(found, {}, argparse.Namespace(threads=1, rounds=3, only="ours"))
