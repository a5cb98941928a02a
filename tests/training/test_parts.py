"""The small pure parts of training, and what a run writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_slm.config.load import parse
from megatron_slm.config.optimizer import OptimizerConfig
from megatron_slm.engine.trainer import StepResult
from megatron_slm.loss.sums import LossSums
from megatron_slm.telemetry.metrics import MetricsWriter, training_metrics
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.optimizer import build_optimizer, parameter_groups
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

ROW_METRICS = dict.fromkeys(("backward_row_share", "backward_added_variance", "backward_added_variance_max"))
"""Not set where backward passes run on all rows."""
METRIC_NAMES = (
    "step samples tokens lr loss loss_all loss_unselected reference_loss divergence excess_selected "
    "excess_unselected excess_all "
    "excess_spread keep_fraction kept_tokens valid_tokens nonfinite_tokens score_p05 score_p25 score_p50 score_p75 score_p95 grad_norm "
    "backward_row_share backward_added_variance backward_added_variance_max skip_reason step_time_seconds tokens_per_second tflops_per_device mfu mfu_with_reference skipped_steps clipped_share "
    "memory_allocated_mib memory_peak_mib memory_host_mib memory_host_peak_mib ranks"
).split()


def rates(steps: int, **options: Any) -> list[float]:
    return [round(learning_rate(step, OptimizerConfig(lr=1.0, **options), steps), 6) for step in range(steps)]


def test_learning_rates() -> None:
    assert rates(4, lr_decay_style="constant", lr_warmup_iters=2) == [0.5, 1.0, 1.0, 1.0]
    assert rates(6, lr_decay_style="linear", lr_warmup_iters=2, min_lr=0.2) == [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    assert rates(4, lr_decay_style="cosine") == [1.0, 0.853553, 0.5, 0.146447]
    assert rates(6, lr_decay_style="WSD", lr_wsd_decay_iters=2, lr_warmup_iters=1) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert rates(5, lr_decay_style="linear", lr_decay_iters=2, min_lr=0.1) == [1.0, 0.55, 0.1, 0.1, 0.1]


def test_metrics_are_quotients_of_sums() -> None:
    sums = LossSums(
        kept_loss=12.0, kept_tokens=6, valid_loss=20.0, valid_tokens=10, reference_loss=15.0, kept_excess=3.0, excess_squares=12.5,
        weighted_loss=12.0, nonfinite_tokens=2, ranked_tokens=10, score_p05=-10.0, score_p95=40.0,
    )  # fmt: skip
    result = StepResult(sums=sums, grad_norm=2.0, skip_reason=None, seconds=1.0)
    values = training_metrics(result, has_reference=True)
    assert values == {
        "loss": 2.0, "loss_all": 2.0, "loss_unselected": 2.0, "reference_loss": 1.5, "divergence": None,
        "excess_selected": 0.5,
        "excess_unselected": 0.5, "excess_all": 0.5, "excess_spread": 1.0, "keep_fraction": 0.6, "kept_tokens": 6, "valid_tokens": 10,
        "nonfinite_tokens": 2, "score_p05": -1.0, "score_p25": 0.0, "score_p50": 0.0, "score_p75": 0.0,
        "score_p95": 4.0, "grad_norm": 2.0, "skip_reason": None, **ROW_METRICS,
    }  # fmt: skip
    distilled = replace(result, sums=replace(sums, divergence=3.0))
    assert training_metrics(distilled, has_reference=True, distills=True)["divergence"] == 0.5
    alone = training_metrics(result, has_reference=False)
    assert {name for name, value in alone.items() if value is None} - ROW_METRICS.keys() == {
        "reference_loss",
        "divergence",
        "excess_selected",
        "excess_unselected",
        "excess_all",
        "excess_spread",
        "skip_reason",
    }
    plain = training_metrics(result, has_reference=False, has_scores=False)
    assert {plain[f"score_p{level}"] for level in ("05", "25", "50", "75", "95")} == {None}
    empty = training_metrics(
        StepResult(sums=LossSums(), grad_norm=float("inf"), skip_reason="nonfinite-gradient", seconds=1.0),
        has_reference=True,
    )
    assert empty["loss"] is None
    assert empty["grad_norm"] is None
    assert empty["skip_reason"] == "nonfinite-gradient"


def test_a_resumed_file_tells_one_history(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    second = MetricsWriter(tmp_path, resume_step=2)
    second.write({"step": 3, "loss": 2.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}]


def test_a_fresh_run_keeps_an_older_file(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        writer = MetricsWriter(tmp_path, resume_step=0)
        writer.write({"step": 1, "loss": loss})
        writer.write({"event": "eval", "step": 1, "set": "x", "loss": None})
        writer.close()
    files = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [json.loads((tmp_path / name).read_text().splitlines()[0])["loss"] for name in files] == [1.0, 2.0, 3.0]


def test_weight_decay_is_for_matrices() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = parameter_groups(module, 0.1)
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(4, 3)], [(4,), (4,), (4,)]]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    optimizer = build_optimizer(
        module, OptimizerConfig(lr=2.0, adam_beta2=0.9, adam_eps=1e-3), "torch", torch.device("cpu")
    )
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(2.0, (0.9, 0.9), 1e-3)}


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, eval_interval=2, split="8,2,0",
        valid_data_path=[f"again={corpus}", str(corpus)], save=tmp_path / "elsewhere", save_interval=5,
    )  # fmt: skip
    run_world(train_and_report, 2, values)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [list(line) for line in steps] == [METRIC_NAMES] * 5
    assert [line["samples"] for line in steps] == [8, 16, 24, 32, 40]
    assert steps[-1]["tokens"] == 40 * 16
    evaluations = [(line["step"], line["set"]) for line in lines if line.get("event") == "eval"]
    assert evaluations == [(step, name) for step in (2, 4, 5) for name in ("valid", "again", "corpus")]
    for step in (2, 4, 5):
        losses = {line["set"]: line["loss"] for line in lines if line.get("event") == "eval" and line["step"] == step}
        assert losses["again"] == losses["corpus"] != losses["valid"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["slm-keep-ratio"] == 0.6
    again, _ = parse(["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == parse(flags(values))[0]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "elsewhere" / "latest").read_text() == "step_00000005"
    assert not (tmp_path / "run" / "checkpoints").exists()


def dry_run(argv: list[str], world_size: str) -> str:
    import contextlib
    import io
    import os

    from megatron_slm.cli.pretrain import main

    os.environ.update(WORLD_SIZE=world_size, COLUMNS="140")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0
    assert not torch.distributed.is_initialized()
    return out.getvalue()


def test_a_dry_run_prints_the_layout_and_trains_nothing(tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
    )  # fmt: skip
    (text,) = run_world(dry_run, 1, [*flags(values), "--dry-run"], "8")
    for expected in (
        "8 ranks = 2 stages x 2 data parallel x 2 tensor parallel, ZeRO-1",
        "embedding, 2 blocks",
        "2 blocks, head",
        "8 samples = 2 a micro-batch x 2 micro-batches x 2 data parallel",
        "scaled_dot_product_attention",
        "skewed, predicted step",
        "640",  # tokens of the run
        "nothing was trained",
    ):
        assert expected in text, text
    assert not (tmp_path / "run").exists()
