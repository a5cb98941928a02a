"""The real launcher starts the real scoring pass, and a run reads what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.reference.manifest import StoreManifest
from tests.support.commands import run_here
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.world import free_port

BIN = Path(sys.executable).parent


def start(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_launch(tmp_path: Path) -> None:
    """Scored on two stages by `deepspeed`, from the very YAML file that the run is started with."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(corpus, tmp_path / "run", objective="slm", train_iters=2)
    config = tmp_path / "run.yaml"
    store = tmp_path / "scores"
    config.write_text("".join(f"{k}: {v}\n" for k, v in values.items() if k != "lr") + f"reference-scores: {store}\n")
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = start(
        *launcher, "tools/score_corpus.py", "--config", str(config), "--reference-load", str(reference),
        "--pipeline-model-parallel-size", "2", "--score-dtype", "bfloat16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scored 16 of 16 samples" in done.stderr
    manifest = StoreManifest.read(store)
    assert (manifest.dtype, manifest.num_shards, len(manifest.shards)) == ("bfloat16", 8, 8)

    trained = start(sys.executable, "tools/pretrain_slm.py", "--config", str(config), "--lr", "1e-2")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert '"reference_loss": ' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_dry_run_and_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(corpus, tmp_path / "run", objective="slm", reference_load=reference, output=tmp_path / "scores")
    done = run_here("score", *flags(values), "--dry-run", "--with-entropy")
    assert done.returncode == 0, done.stderr
    assert "nothing was scored" in done.stdout
    assert "40 of 16 tokens, 640 in all" in done.stdout
    assert not (tmp_path / "scores").exists()
    shown = run_here("score", "--help")
    assert shown.returncode == 0
    assert all(flag in shown.stdout for flag in ("--output", "--score-dtype", "--with-entropy"))
