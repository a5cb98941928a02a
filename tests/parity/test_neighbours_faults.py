"""Faults of neighbouring systems in gradients, masks and random states of pipelines, tried here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megatron_slm.checkpoint.snapshot import RNG_CPU
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.model.rope import rotate, rotation
from tests.support.runs import VOCAB_SIZE, recorded, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world


def train_all(runs: list[dict[str, Any]]) -> None:
    """Run trainings one after another in one world."""
    for values in runs:
        train_and_report(values)


@pytest.mark.slow
def test_no_stage_scales_its_gradient_by_the_accumulation(tmp_path: Path) -> None:
    """One batch cut into 1, 2 and 8 micro-batches on 1, 2 and 4 stages has one norm, which no clipping hides."""
    corpus, norms = write_corpus(tmp_path / "corpus"), {}
    for stages in (1, 2, 4):
        runs = {
            accumulation: run_flags(
                corpus, tmp_path / f"{stages}_{accumulation}", train_iters=2, clip_grad=0, global_batch_size=8,
                micro_batch_size=8 // accumulation, pipeline_model_parallel_size=stages,
            )
            for accumulation in (1, 2, 8)
        }  # fmt: skip
        run_world(train_all, stages, list(runs.values()))
        for accumulation, values in runs.items():
            norms[stages, accumulation] = [line["grad_norm"] for line in recorded(values["run-dir"])]
    for cut, found in norms.items():
        assert found == pytest.approx(norms[1, 1], rel=1e-4), cut


@pytest.mark.slow
def test_a_large_tied_vocabulary_on_first_and_last_of_four_stages(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(
        corpus, tmp_path / "run", vocab_size=151_935, bf16=True, hidden_size=16, ffn_hidden_size=24, train_iters=2,
        pipeline_model_parallel_size=4, micro_batch_size=1, global_batch_size=4,
        no_untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    run_world(train_and_report, 4, values)
    lines = recorded(tmp_path / "run")
    assert [(line["step"], line["skip_reason"]) for line in lines] == [(1, None), (2, None)]
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.slow
def test_samples_without_a_label_among_others_under_tensor_parallelism(tmp_path: Path) -> None:
    """Micro-batches of 4 with documents kept apart; some samples have masked labels only."""
    eod, generator = VOCAB_SIZE - 1, np.random.default_rng(0)
    with IndexedCorpusWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(10):
            writer.add_document(np.append(generator.integers(0, eod, 30), eod))
            writer.add_document(np.full(50, eod))
    runs = {
        tensor: run_flags(
            tmp_path / "corpus", tmp_path / f"tp{tensor}", micro_batch_size=4, reset_attention_mask=True,
            reset_position_ids=True, eod_mask_loss=True, tensor_model_parallel_size=tensor,
        )
        for tensor in (1, 2)
    }  # fmt: skip
    for tensor, values in runs.items():
        run_world(train_and_report, tensor, values)
    one, two = ([(line["loss"], line["grad_norm"]) for line in recorded(v["run-dir"])] for v in runs.values())
    assert two == [pytest.approx(pair, rel=1e-4) for pair in one]
    tokens = [line["valid_tokens"] for line in recorded(runs[1]["run-dir"])]
    assert min(tokens) < 8 * 16 / 2, "half of the labels and more are masked"


@pytest.mark.slow
def test_probes_leave_random_states_alone(tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    (tmp_path / "texts.txt").write_text("3 5 7 9\n\n2 4 6 8\n")
    common = {"objective": "slm", "reference_load": reference, "save_interval": 2}

    def values(name: str, steps: int, **changes: Any) -> dict[str, Any]:
        return run_flags(corpus, tmp_path / name, train_iters=steps, lr_decay_iters=4, **common, **changes)

    begun = tmp_path / "begun" / "checkpoints"
    probes = {"slm_probe_interval": 1, "probe_file": tmp_path / "texts.txt", "eval_interval": 1}
    runs = [
        values("begun", 2),
        values("plain", 4, load=begun, slm_probe_interval=0),
        values("probed", 4, load=begun, **probes),
    ]
    run_world(train_all, 1, runs)
    states = []
    for name in ("plain", "probed"):
        with safe_open(tmp_path / name / "checkpoints/step_00000004/weights_00000.safetensors", "pt") as file:
            states.append(file.get_tensor(RNG_CPU).tolist())
    assert states[0] == states[1]
    assert (tmp_path / "probed" / "probe").is_dir()


@pytest.mark.slow
def test_compiled_rotations_are_exact_beyond_position_4096() -> None:
    """In bf16, positions from 4096 on are multiples of 32, and a compiler may fuse a cast to fp32 away."""
    length, width = 6000, 16
    x_sbhk = torch.randn(length, 1, 2, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), speeds)[:, None, None]
    exact = rotate(x_sbhk.double(), angles.cos(), angles.sin())

    @torch.compile(dynamic=False)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return rotate(x, *rotation(length, width, 10000.0, (), length, x.device))

    found = compiled(x_sbhk)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=5e-3)
