"""The study's comparison of backward passes: its runs, the gain that is kept, its page, and (slow) the whole of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_slm.flags.load import parse
from tests.analysis.test_runs import write_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "study"


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import real_text
        import results
        import rows
        import study
    finally:
        sys.path.remove(str(FOLDER))
    return study, results, rows, real_text


def test_the_runs_differ_in_their_backward_pass_alone(modules: tuple[ModuleType, ...]) -> None:
    study, _, rows, real_text = modules
    plans = {"study": study.planned_rows(Path("out"), 4), "real": real_text.planned(Path("out"), 2)}
    for kind, runs in plans.items():
        by_name = {run.name: run for run in runs}
        assert len({run.folder for run in runs}) == len(runs) == (8 if kind == "study" else 7)
        exact = by_name["slm-0.6"]
        for name, flags in rows.METHODS.items():
            run = by_name[name]
            assert run.flags == (*exact.flags, *flags)
            assert run.wave == exact.wave
        for run in runs:
            earlier = {f"{other.folder}/checkpoints" for other in runs if other.wave < run.wave}
            assert {word for word in run.flags if word.endswith("/checkpoints")} <= earlier
        assert by_name["clean-rows"].flags == (*by_name["reference"].flags, *rows.SAMPLED)
    for run, kind in ((plans["study"][-1], "kept"), (plans["real"][-1], "sampled")):
        config, _ = parse(study.flags_of(Path("out"), run, fast=False))
        assert config.backward.backward_rows == kind


@pytest.mark.parametrize("fast", [False, True])
def test_no_run_gives_a_flag_twice(modules: tuple[ModuleType, ...], fast: bool) -> None:
    """Not one that is shorter than the others, nor by a few steps or flags of one's own, which count in their place."""
    study, _, _, real_text = modules
    out, own = Path("out"), ("--hidden-size", "96", "--lr", "1e-3")
    real = real_text.planned(out, 1, 300, 200, own)
    runs = [*study.planned(out, 1), *study.planned_rows(out, 1), *study.planned_losses(out, 1), *real]
    for run in runs:
        flags = [word for word in study.flags_of(out, run, fast) if word.startswith("--")]
        assert len(flags) == len(set(flags)), run.folder
    for run, length in ((runs[0], 480), (runs[1], 160), (real[0], 200), (real[3], 300), (real[-1], 200)):
        config, _ = parse(study.flags_of(out, run, fast))
        assert config.training.train_iters == (6 if fast else length)
        assert config.training.seed == run.seed
        if run in real:
            assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (6, 96, 1e-3)


def test_gain_kept_by_hand(modules: tuple[ModuleType, ...]) -> None:
    gain_kept = modules[2].gain_kept
    clm, exact = {1: 1.10, 2: 1.30, 3: 9.0}, {1: 1.00, 2: 1.10}
    method = {1: 1.03, 2: 1.10, 4: 0.0}
    found = gain_kept(method, exact, clm)
    assert found["seeds"] == [1, 2]
    assert found["gain"] == pytest.approx(0.15)
    assert found["mean"] == pytest.approx(1 - 0.015 / 0.15)
    width = 12.706 * math.sqrt(2 * 0.015**2) / math.sqrt(2) / 0.15
    assert (found["low"], found["high"]) == pytest.approx((found["mean"] - width, found["mean"] + width))
    assert gain_kept({1: 1.0}, {1: 1.0}, {1: 1.5})["low"] is None, "one seed has no interval"
    assert gain_kept(method, clm, exact)["mean"] is None, "no gain"


def test_the_page_has_what_is_finished(tmp_path: Path, modules: tuple[ModuleType, ...]) -> None:
    study, results, rows, _ = modules
    runs = [run for seed in (1, 2) for run in study.planned_rows(tmp_path, seed)]
    with pytest.raises(SystemExit, match="not finished yet"):
        rows.write_rows(tmp_path, results.Results(runs), tmp_path / "none.json")
    finals = {"clm": 2.0, "slm-0.6": 1.0, "rows-0.02": 1.02, "rows-kept": 1.5, "reference": 0.5, "clean-rows": 0.51}
    for run in runs:
        if run.name in finals:
            final = finals[run.name] + (run.seed == 2) * 0.01
            write_run(run.folder, final=final)
            (run.folder / "finished").touch()
            inside = {"steps": [0, 20], "inside": [3.0, final], "ends": [1.0, 0.0]}
            (run.folder / "inside.json").write_text(json.dumps(inside))
    benchmark = tmp_path / "backward.json"
    records = [
        {"name": n, "keep": 0.6, "step_ratio": x} for n, x in (("exact", 0.97), ("sampled 0.02", 0.79), ("kept", 0.7))
    ]
    benchmark.write_text(json.dumps([*records, {"name": "kept", "keep": 0.3, "step_ratio": 0.1}]))
    path = rows.write_rows(tmp_path, results.Results(runs), benchmark)
    page, numbers = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert numbers["rows-0.02"]["target"]["mean"] == pytest.approx(0.98)
    assert numbers["rows-kept"]["inside"]["mean"] == pytest.approx(0.5)
    assert "rows-share" not in numbers
    row = next(line for line in page.splitlines() if line.startswith("| rows-0.02 |"))
    assert "0.98 [0.98, 0.98]" in row
    assert row.endswith("| 0.790 |")
    assert "- Reached by rows-0.02 (target)" in page
    assert "**Not reached** by rows-kept (inside)" in page
    assert "by seed: +0.0100, +0.0100 nats" in page
    assert "Final losses, inside (means, nats): clm 2.0050, slm-0.6 1.0050, rows-0.02 1.0250, rows-kept 1.5050." in page
    assert "Made by `python examples/study/study.py results --rows`." in page
    assert path.with_name("rows.png").read_bytes().startswith(b"\x89PNG")


def test_real_text_is_split_without_overlap(modules: tuple[ModuleType, ...]) -> None:
    split = modules[3].split
    curated, web = [f"curated {i}" for i in range(50)] * 2, [f"web {i}" for i in range(9)]
    parts = split(curated, web, 0, held_out=10)
    assert parts == split(curated[::-1], web, 0, held_out=10)
    assert [len(parts[name]) for name in ("curated_heldout", "curated_train", "noisy_train")] == [10, 20, 20 + 9]
    everything = [text for texts in parts.values() for text in texts]
    assert len(set(everything)) == len(everything) == 59
    assert set(web) <= set(parts["noisy_train"])


def test_real_text_has_line_ends_of_its_own(tmp_path: Path, modules: tuple[ModuleType, ...]) -> None:
    texts = ["one\u2028two", "three\x85four\x0cfive", "six"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    assert modules[3].read([tmp_path / "texts.jsonl"]) == texts


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_real_text_from_files_to_page(tmp_path: Path) -> None:
    """A few steps of every run, each a process as a user starts it."""
    for name, words in (("curated", "add carry total"), ("web", "the of and")):
        texts = [f"{words} {i} {i * 7 % 13} {words[::-1]} {i * i}. " * 6 for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    for command in (
        ["make", "--curated", f"{tmp_path}/curated.jsonl", "--web", f"{tmp_path}/web.jsonl", "--fast"],
        ["train", "--fast", "--jobs", "1"],
        ["results", "--fast"],
    ):
        words = [sys.executable, str(FOLDER / "real_text.py"), *command, "--out", str(tmp_path / "out")]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "rows-kept" in (tmp_path / "out/results/rows.md").read_text()
