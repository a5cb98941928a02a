"""SlmTrainer and its mixin over TRL's SFTTrainer: gradients, metrics, stored losses, several processes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.hub_models import WORDS, save_model_and_tokenizer, write_text

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")

EXAMPLES = Path("examples/python").resolve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer")
    for seed, name in enumerate(("base", "reference")):
        save_model_and_tokenizer(path / name, seed=seed)
    write_text(path / "text.txt")
    return path


def _words(folder: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", folder / "base", "--reference", folder / "reference", "--output", output]
    return [*map(str, paths), *more]


def _train(script: str, words: list[str]) -> list[dict[str, float]]:
    assert len((EXAMPLES / script).read_text().splitlines()) <= 60
    history = runpy.run_path(str(EXAMPLES / script))["main"](words)
    return [line for line in history if "loss" in line]


def test_the_example_trains_with_a_model_and_with_its_stored_losses_alike(folder: Path, tmp_path: Path) -> None:
    base = ["--text", str(folder / "text.txt"), "--length", "32", "--steps", "3"]
    live = _train("hugging_face_trainer.py", _words(folder, tmp_path / "live", *base))
    stored = _train("hugging_face_trainer.py", _words(folder, tmp_path / "stored", *base, "--store"))
    assert [line["keep_fraction"] for line in live] == [pytest.approx(38 / 62)] * 3  # ceil(0.6 * 2 * 31)
    for one, other in zip(live, stored, strict=True):
        for name in ("loss", "loss_all", "reference_loss", "excess_selected", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert live[0]["excess_selected"] > live[0]["loss_all"] - live[0]["reference_loss"]
    assert (tmp_path / "live" / "model.safetensors").is_file()


TRAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, TrainingArguments
from megatron_slm import SlmTrainer, make_selector
base, reference, output, batch, accumulation = sys.argv[1:]
rows = [{"input_ids": row, "labels": row} for row in torch.randint(20, (24, 13), generator=torch.Generator().manual_seed(0))]
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
args = TrainingArguments(output, max_steps=3, per_device_train_batch_size=int(batch), logging_steps=1, seed=1,
    gradient_accumulation_steps=int(accumulation), save_strategy="no", report_to="none", use_cpu=True, learning_rate=0.3,
    optim="sgd", max_grad_norm=0)  # a wrong divisor shows: Adam and clipping would hide it
trainer = SlmTrainer(load(base), args, train_dataset=rows, reference_model=load(reference),
    selector=make_selector(keep_ratio=0.5, scope="sequence"))
trainer.train()
trainer.save_model()
"""


def _run(folder: Path, output: Path, processes: int, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    script = output.with_suffix(".py")
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    words = [folder / "base", folder / "reference", output, batch, accumulation]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*map(str, command), *map(str, words)], check=True, env=environment, capture_output=True, text=True)
    return load_file(output / "model.safetensors")


@pytest.mark.slow
def test_two_processes_and_accumulation_end_with_the_weights_of_one(folder: Path, tmp_path: Path) -> None:
    one = _run(folder, tmp_path / "one", 1, 4, 1)
    for name, layout in {"two": (2, 2, 1), "accumulated": (1, 2, 2)}.items():
        other = _run(folder, tmp_path / name, *layout)
        for key, weight in one.items():
            torch.testing.assert_close(other[key], weight, rtol=1e-4, atol=2e-5)


def test_sft_trainer_keeps_completions_only(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "chat.jsonl"
    lines = [{"prompt": " ".join(WORDS[:6]) + " ", "completion": " ".join(WORDS[i : i + 8])} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    history: list[dict[str, Any]] = _train(
        "sft_trainer.py", _words(folder, tmp_path / "sft", "--data", str(data), "--steps", "2")
    )
    assert history[0]["keep_fraction"] == pytest.approx(0.6, abs=0.1)
    assert {"loss_all", "reference_loss", "excess_selected"} <= set(history[0])
