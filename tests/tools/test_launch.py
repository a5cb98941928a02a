"""The real launchers start the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.world import free_port

BIN = Path(sys.executable).parent


def launchers() -> dict[str, list[str]]:
    port = str(free_port())
    return {
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        "python": [sys.executable],
    }


# without a launcher: tests/cli/test_score_corpus.py trains so too
@pytest.mark.parametrize("name", ["deepspeed", "torchrun", pytest.param("python", marks=pytest.mark.slow)])
def test_launch(name: str, tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    stages = 1 if name == "python" else 2
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, train_iters=2, save_interval=2,
        pipeline_model_parallel_size=stages,
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k != "lr"}))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [*launchers()[name], "tools/pretrain_slm.py", "--config", str(config), "--lr", "1e-2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200,
        env={**environment, "PATH": f"{BIN}:{environment['PATH']}", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").exists()
    assert "step 2/2" in done.stderr + done.stdout
    assert "training steps 1 to 2; the first takes longest" in done.stderr + done.stdout


def test_a_launched_error_passes_its_exit_code_on(tmp_path: Path) -> None:
    values = run_flags(tmp_path / "nothing", tmp_path / "run", pipeline_model_parallel_size=2)
    command = [*launchers()["deepspeed"], "tools/pretrain_slm.py", *flags(values)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode != 0
    errors = [line for line in (done.stderr + done.stdout).splitlines() if "error: " in line and "nothing" in line]
    assert errors
    assert "Traceback" not in done.stderr + done.stdout
