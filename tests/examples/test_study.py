"""The study: its plan, what its page says of good and bad outcomes, and (slow) the whole script."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_slm.flags.load import parse
from tests.analysis.test_runs import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleType, ModuleType]:
    """`study` and `results`, which stand beside each other and are no package."""
    folder = str(ROOT / "examples" / "study")
    sys.path.insert(0, folder)
    try:
        import results
        import study
    finally:
        sys.path.remove(folder)
    return study, results


def test_every_planned_run_is_a_configuration(modules: tuple[ModuleType, ModuleType]) -> None:
    """References come before the runs that need them; every name is there once."""
    runs = list(modules[0].planned(Path("runs/study"), 1))
    assert len({run.folder for run in runs}) == len(runs) == 18
    for run in runs:
        config, _ = parse(["--config", str(ROOT / "examples/study/train.yaml"), *run.flags])
        earlier = {f"{other.folder}/checkpoints" for other in runs if other.wave < run.wave}
        assert config.selection.reference_load in (None, *earlier)
        assert config.model.init_from == (None if run.name == "base" else "runs/study/seed1/base/checkpoints")
        if run.name.startswith("random"):
            assert config.selection.slm_score == ["random"]
            assert config.selection.reference_load is None


def test_the_runs_that_compare_losses(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    study, results = modules
    runs = study.planned_losses(tmp_path, 1)
    assert [run.name for run in runs] == ["base", "reference", "clm", "slm-0.6", "se-kd", "se-kd-alone", "dft"]
    parsed = {run.name: parse(["--config", str(ROOT / "examples/study/train.yaml"), *run.flags])[0] for run in runs}
    selection, loss = parsed["se-kd"].selection, parsed["se-kd"].distillation
    assert (selection.slm_score, selection.slm_keep_ratio, loss.loss) == (["entropy"], 0.2, "kl")
    weights = [parsed[name].distillation.distillation_weight for name in ("se-kd", "se-kd-alone")]
    assert weights == [0.5, 1.0]
    assert (parsed["dft"].selection.slm_weight, parsed["dft"].selection.slm_keep_ratio) == ("dft", 0.6)
    for name in ("slm-0.6", "se-kd", "dft"):
        assert parsed[name].selection.reference_load == f"{tmp_path}/seed1/reference/checkpoints"
        assert parsed[name].model.init_from == f"{tmp_path}/seed1/base/checkpoints"
        assert parsed[name].data.data_path == parsed["clm"].data.data_path
    more = [run for seed in (1, 2) for run in study.planned_losses(tmp_path, seed) if run.name != "base"]
    finals = {"reference": 0.4, "clm": 0.6, "slm-0.6": 0.5, "se-kd": 0.7, "se-kd-alone": 0.7, "dft": 0.65}
    for run in more:
        write_run(run.folder, final=finals[run.name] + 0.01 * run.seed * (run.name == "se-kd"))
        (run.folder / "finished").touch()
        if run.name != "dft":
            found = {"steps": [0, 40], "inside": [2.0, finals[run.name] - 0.3], "ends": [2.0, 1.0]}
            (run.folder / "inside.json").write_text(json.dumps(found))
    path = study.losses.write_losses(tmp_path, results.Results(more))
    rows = {line.split(" | ")[0][2:]: line for line in path.read_text().splitlines() if line.startswith("| ")}
    assert list(rows) == ["run", "clm", "slm-0.6", "se-kd", "se-kd-alone", "dft", "reference"]
    target = "| 0.840 ± 0.064 | +0.115 (+0.110 to +0.120) | +0.215 (+0.210 to +0.220) |"
    assert rows["se-kd"].startswith(f"| se-kd | 2 {target} 0.400 ± 0.000 | +0.100 (+0.100 to +0.100) |")
    assert rows["dft"].endswith("| – | – | – | – |"), "neither inside of problems nor on noisy pages"
    assert rows["clm"].startswith("| clm | 2 | 0.725 ± 0.000 | – | +0.100"), "nothing less itself"
    numbers = json.loads(path.with_suffix(".json").read_text())["se-kd"]
    assert numbers["inside"] == pytest.approx({"1": 0.4, "2": 0.4})
    assert numbers["ends"] == {"1": 1.0, "2": 1.0}, "of which the page tells"
    assert path.with_name("losses.png").read_bytes().startswith(b"\x89PNG")


def finish(run: Any, final: float, clean_kept: float) -> None:
    """Pretend that a run is done: its metrics, and what it keeps of 60 clean and 40 other tokens."""
    write_run(run.folder, final=final)
    (run.folder / "finished").touch()
    groups = [
        {"grouping": "part of the document", "name": name, "tokens": tokens, "kept_share": share, "mean_loss": loss}
        for name, tokens, share, loss in (("arithmetic", 60, clean_kept, 1.0), ("noise", 40, 0.5, 4.0))
    ]
    kept = 60 * clean_kept + 40 * 0.5
    (run.folder / "selection.json").write_text(json.dumps({"kept_tokens": kept, "groups": groups}))
    inside = {"steps": [0, 20, 40], "inside": [3.0, final + 0.5, final], "ends": [2.0, 1.0, 0.0]}
    (run.folder / "inside.json").write_text(json.dumps(inside))
    if run.followed:
        rows = {key: [0.5, 0.4, 0.3] for key in ("kept", "other", "precision", "recall")}
        (run.folder / "followed.json").write_text(json.dumps({"steps": [0, 20, 40], **rows}))


@pytest.mark.parametrize("good", [True, False])
def test_the_page_says_what_came_out(tmp_path: Path, modules: tuple[ModuleType, ModuleType], good: bool) -> None:
    study, results = modules
    runs = [run for seed in (1, 2) for run in study.planned(tmp_path, seed, (0.6, 0.4))]
    finals = {
        "base": 2.0,
        "clm": 1.0,
        "slm-0.6": 0.0 if good else 1.5,
        "random-0.6": 1.2,
        "slm-0.4": 0.9,
        "reference": 0.0,
    }
    for run in runs:
        if run.name in finals:
            finish(run, finals[run.name], clean_kept=1.0 if good else 0.5)
    path = results.write_results(tmp_path, runs)
    page = path.read_text()
    for picture in ("target.png", "inside.png", "kept.png", "keep-ratio.png"):
        assert path.with_name(picture).read_bytes().startswith(b"\x89PNG")
        assert f"]({picture})" in page
    assert "8 planned runs are not finished" in page
    assert "| base |" not in page
    found = results.Results(runs)
    assert found.best_ratio() == (0.6 if good else 0.4)
    target = 1 + 4 / 32
    before, after = 4 / 2 ** math.floor(math.log2(4 / target)), 4 / 2 ** math.ceil(math.log2(4 / target))
    place = 8 * (math.floor(math.log2(4 / target)) + (before - target) / (before - after))
    ratio = found.tokens_ratio("slm-0.6")
    assert ratio == pytest.approx({1: place / 40, 2: place / 40}) if good else ratio == {1: math.inf, 2: math.inf}
    of_inside = found.inside_ratio("slm-0.6")  # from 3.0 to 0.5 in the first half: 1.0 after 16 of 40 steps
    assert of_inside == pytest.approx({1: 0.4, 2: 0.4}) if good else of_inside == {1: math.inf, 2: math.inf}
    precision, recall, base = found.kept("slm-0.6")
    assert (precision[0], recall[0], base[0]) == pytest.approx((60 / 80, 1.0, 0.6) if good else (0.6, 0.5, 0.6))
    verdicts = list(results.verdicts(found))
    wanted = [good, good, good, good]
    assert [verdict.startswith("Reached") for verdict in verdicts] == wanted, verdicts
    row = next(line for line in page.splitlines() if line.startswith("| slm-0.6 |"))
    assert ("never in 2 of 2" in row) is (not good)


def test_means_and_intervals(modules: tuple[ModuleType, ModuleType]) -> None:
    mean, width = modules[1].mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, width) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert modules[1].shown([0.5]) == "0.500"


def test_nothing_to_compare_yet(tmp_path: Path, modules: tuple[ModuleType, ModuleType]) -> None:
    with pytest.raises(SystemExit, match="not finished yet"):
        modules[1].write_results(tmp_path, list(modules[0].planned(tmp_path, 1)))


def test_the_held_out_problems_are_in_no_other_corpus(tmp_path: Path, modules: tuple[ModuleType, ModuleType]) -> None:
    """Whole or within a page; the shares of clean text are those the page tells; the same seed gives the same."""
    folder = str(ROOT / "examples" / "study")
    sys.path.insert(0, folder)
    try:
        import corpora
    finally:
        sys.path.remove(folder)
    counts = {"curated": 1500, "web": 60, "noisy": 1500, "heldout": 200}  # some would be there by chance
    made = corpora.make(tmp_path / "a", 0, **counts)
    corpora.make(tmp_path / "b", 0, **counts)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    held_out = [document.text for document in made["curated_heldout"]]
    for name in ("curated_train", "web_train", "noisy_train", "noisy_heldout"):
        texts = "\n".join(document.text for document in made[name])
        assert not [text for text in held_out if text in texts], name
    lines = (tmp_path / "a" / "noisy_heldout.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert sum(length for _, length in record["spans"]) == len(record["text"])

    def clean(name: str) -> float:
        segments = [segment for document in made[name] for segment in document.segments]
        return sum(len(t) for k, t in segments if k == "arithmetic") / sum(len(t) for _, t in segments)

    assert clean("curated_train") == 1.0
    assert 0.35 < clean("noisy_train") < 0.55
    assert clean("web_train") < 0.2


def test_an_interrupted_run_is_made_again(
    tmp_path: Path, modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished runs are left alone, what was begun starts clean, a failure names its log, waves follow one another."""
    study, _ = modules
    runs = list(study.planned(tmp_path, 1, (0.6,)))
    started: list[str] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        run_dir = Path(command[command.index("--run-dir") + 1])
        assert not (run_dir / "rest").exists()
        started.append(run_dir.name)
        return subprocess.CompletedProcess(command, int(run_dir.name == "random-0.6"))

    monkeypatch.setattr(study.subprocess, "run", fake)
    done, begun = runs[0].folder, runs[1].folder
    done.mkdir(parents=True)
    (done / "finished").touch()
    begun.mkdir()
    (begun / "rest").touch()
    with pytest.raises(SystemExit, match=r"random-0.6 of seed 1 failed: see .*log.txt"):
        study.train(tmp_path, runs, fast=False, jobs=1)
    assert started[:2] == ["reference", "clm"]
    assert {"base", "self-reference-0.6"}.isdisjoint(started[:2])
    assert not (tmp_path / "seed1" / "random-0.6" / "finished").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_script() -> None:
    """A few steps of everything."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = str(ROOT / "examples/study/run.sh")
    done = subprocess.run(["bash", script, "--fast"], capture_output=True, text=True, timeout=880, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "runs/study_fast/results/README.md").read_text()
    assert "slm-0.6" in page
    assert "self-reference-0.6" in page
    assert "not finished" not in page
    assert "inside the problems of the target" in page
