"""A reference that hardly differs from the model is warned of once, with the spread of the excess losses."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.cli.pretrain import main
from megatron_slm.telemetry.metrics import describe_weak_reference
from tests.support.runs import flags, recorded, run_flags, save_hf_llama, write_corpus
from tests.support.world import run_world


@pytest.mark.parametrize(("spread", "dtype"), [(0.079, torch.bfloat16), (1.3e-6, torch.float32), (None, torch.float32)])
def test_a_spread_beyond_rounding_is_fine(spread: float | None, dtype: torch.dtype) -> None:
    assert describe_weak_reference(spread, dtype) is None


def test_the_figures_are_named() -> None:
    text = describe_weak_reference(0.0312, torch.bfloat16)
    assert text is not None
    assert "spread of 0.031 nats, within the rounding noise of bf16 (about 0.078)" in text
    assert "fp32" in text
    assert describe_weak_reference(0.0, torch.float32) is not None


def console_of_runs(runs: list[dict[str, Any]]) -> list[str]:
    """Run trainings; the console of each."""
    texts = []
    for values in runs:
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            assert main(flags(values)) == 0
        texts.append(" ".join(text.getvalue().split()))
    return texts


def test_a_run_against_itself_warns_once(tmp_path: Path) -> None:
    corpus, model = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "model")
    other = save_hf_llama(tmp_path / "other", seed=1)
    shape = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"))

    def values(name: str, reference: Path, **changes: Any) -> dict[str, Any]:
        return run_flags(
            corpus, tmp_path / name, objective="slm", init_from=model, reference_load=reference, train_iters=2, lr=0,
            init_method_std=None, **shape, **changes,
        )  # fmt: skip

    runs = [values("same", model), values("other", other), values("by_reference", model, slm_score="reference-loss")]
    same, different, by_reference = run_world(console_of_runs, 1, runs)[0]
    assert same.count("warning: step 1: excess losses have a spread of 0 nats") == 1
    assert same.count("excess losses have a spread") == 1
    assert "spread" not in different
    assert "spread" not in by_reference, "this score does not subtract the reference"
    assert [line["excess_spread"] for line in recorded(tmp_path / "same")] == [0.0, 0.0]
    assert all(line["excess_spread"] > 0.1 for line in recorded(tmp_path / "other"))
