"""The YAML of every example for the CPU is a run that can start, and every script runs to its end."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.flags.load import parse
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import score_here
from tests.support.training import train_and_report
from tests.support.world import run_world

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "examples" / name for name in ("quickstart", "study", "small/self_reference", "small/weak_to_strong")]
CONFIGS = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
SCRIPTS = [folder / "run.sh" for folder in FOLDERS]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "examples"))


def test_there_are_recipes() -> None:
    assert {path.parent for path in CONFIGS} == set(FOLDERS)
    for path in CONFIGS:
        assert {"README.md", "run.sh"} <= {other.name for other in path.parent.iterdir()}


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_dry_run_of_every_configuration(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small corpus in place of the one that the recipe makes, as CLM and with a reference."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    data = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "96", "--valid-data-path", f"held={corpus}"]
    common = [
        "--config",
        str(config),
        "--dry-run",
        "--data-path",
        str(corpus),
        "--run-dir",
        str(tmp_path / "run"),
        *data,
    ]
    for objective in (["clm"], ["slm", "--reference-load", str(reference)]):
        assert main([*common, "--objective", *objective]) == 0
        assert "nothing was trained" in capsys.readouterr().out
    parsed, _ = parse(["--config", str(config)])
    assert parsed.training.global_batch_size is not None, "without it the number of samples follows the layout"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_name_files_that_exist(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    folder = str(script.parent.relative_to(ROOT))
    named = re.findall(r"(?:tools|examples)/[\w/]+\.(?:py|sh)|\$here/[\w.]+", text)
    assert named
    for path in named:
        assert (ROOT / path.replace("$here", folder)).exists(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.parent.name not in ("quickstart", "study")], ids=name_of
)
def test_a_recipe_runs(script: Path) -> None:
    """The whole script, a few steps of everything."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(["bash", str(script), "--fast"], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(r'"set": "(target|noisy)", "loss": (\d\.\d+)', done.stdout)
    assert len(losses) >= 4
    assert all(float(loss) < 6.3 for _, loss in losses), "better than guessing among 512 tokens"


def test_storage_counts_what_rounding_changes(tmp_path: Path) -> None:
    """As two stores of one reference do, selected from at the same weights."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    run = {"objective": "slm", "train_iters": 1, "micro_batch_size": 64, "global_batch_size": 64}
    kept = {}
    for dtype in ("float32", "bfloat16"):
        store = tmp_path / dtype
        run_world(
            score_here,
            1,
            run_flags(corpus, tmp_path / "run", **run, reference_load=reference, output=store, score_dtype=dtype),
        )
        ((_, kept[dtype]),) = run_world(
            train_and_report, 1, run_flags(corpus, tmp_path / "run", **run, reference_scores=[store])
        )[0]["kept"]
    (counts,) = run_world(
        count_changes, 1, run_flags(corpus, tmp_path / "run", **run, reference_scores=[tmp_path / "float32"])
    )
    assert counts["kept"] == len(kept["float32"]) == 615
    assert counts["torch.bfloat16"] == len(set(kept["float32"]) - set(kept["bfloat16"])) > 0
    assert counts["torch.float16"] <= counts["torch.bfloat16"]


def count_changes(values: dict[str, Any]) -> dict[str, int]:
    spec = importlib.util.spec_from_file_location("storage", ROOT / "examples/small/self_reference/storage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.main(flags(values)))
