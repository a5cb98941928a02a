"""A reference that follows the model: the average that its definition gives, at any layout, schedule and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_slm.config.load import parse
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.run.plan import make_plan
from megatron_slm.training.build import build_run
from megatron_slm.training.loop import train
from tests.parity.test_resume import metrics
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

EMA = {"reference_update": "ema", "reference_update_decay": 0.6}
HISTORY = {"reference_update": "history", "reference_update_interval": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def values_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Flags of a run that starts from a model on disk, which is its reference too."""
    values = run_flags(
        folder / "corpus", folder / name, objective="slm", init_from=folder / "model", reference_load="init",
        train_iters=4, slm_probe_interval=2, **changes,
    )  # fmt: skip
    for flag in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"):
        del values[flag]
    del values["init-method-std"]
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("following")
    write_corpus(path / "corpus")
    save_hf_llama(path / "model")
    return path


def averages(values: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The largest distance of the reference from the definition's average, and from the model, after every step."""
    init_distributed()
    run = build_run(make_plan(parse(flags(values))[0], dist.get_world_size()))
    engine: Any = run.trainer.engine
    model, reference = list(engine.module.parameters()), list(engine.context.reference.parameters())
    expected = [p.detach().clone().double() for p in model]
    update, config = run.following.update, run.plan.config.reference_update  # type: ignore[union-attr]
    distances: list[list[float]] = [[], []]

    def watched(parameters: Any) -> None:
        update(parameters)
        for mean, p in zip(expected, model, strict=True):
            mean.mul_(config.decay).add_(p.detach().double(), alpha=1 - config.decay)
        for found, others in zip(distances, (expected, model), strict=True):
            pairs = zip(reference, others, strict=True)
            found.append(max(float((a - b.detach()).abs().max()) for a, b in pairs))

    run.following.update = watched  # type: ignore[union-attr, method-assign]
    train(run)
    return distances[0], distances[1]


@pytest.mark.parametrize("update", [EMA, pytest.param(HISTORY, marks=pytest.mark.slow)], ids=["ema", "history"])
def test_the_definitions_average(folder: Path, update: dict[str, Any]) -> None:
    ((from_definition, from_model),) = run_world(
        averages, 1, values_of(folder, f"by hand {len(update)}{update}", **update)
    )
    assert len(from_definition) == (4 if update is EMA else 2)
    assert max(from_definition) < 1e-6
    assert (min(from_model) > 1e-4) == (update is EMA)


def assert_same_losses(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "loss_all", "reference_loss", "grad_norm"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-5), name


def test_every_layout_and_schedule(folder: Path) -> None:
    run_world(train_and_report, 1, values_of(folder, "single", **EMA))
    single = metrics(folder / "single")
    losses = [line["reference_loss"] for line in single if "reference_loss" in line]
    assert losses[-1] < losses[0] - 0.01, "the reference learns with the model"
    layout = {**PP2, "tensor_model_parallel_size": 2}
    run_world(train_and_report, 4, values_of(folder, "pp2 tp2", **EMA, **layout))
    assert_same_losses(metrics(folder / "pp2 tp2"), single)


def test_schedules_and_a_resume_have_the_same_bits(folder: Path) -> None:
    """Stopped after a step without an update, with work ahead between updates; a probe is in between too."""
    update = {**EMA, "reference_update_interval": 3}
    for mode in ("ride-along", "skewed"):
        run_world(train_and_report, 2, values_of(folder, mode, **update, **PP2, reference_schedule=mode))
    assert metrics(folder / "skewed") == metrics(folder / "ride-along")
    saving = values_of(folder, "stopped", **update, **PP2, save_interval=1)
    run_world(train_and_report, 2, {**saving, "lr-decay-iters": 4, "train-iters": 2})
    again = {**saving, "load": folder / "stopped" / "checkpoints", "lr-decay-iters": 4}
    run_world(train_and_report, 2, again)
    plain = [line for line in metrics(folder / "skewed") if "event" not in line]
    assert [line for line in metrics(folder / "stopped") if "event" not in line] == plain


@pytest.mark.slow
def test_a_resume_at_another_layout_continues_the_average(folder: Path) -> None:
    saving = values_of(folder, "first half", **EMA, save_interval=1)
    run_world(train_and_report, 1, {**saving, "lr-decay-iters": 4, "train-iters": 2})
    layout = {**PP2, "tensor_model_parallel_size": 2}
    again = values_of(folder, "first half", **EMA, **layout, load=folder / "first half" / "checkpoints")
    run_world(train_and_report, 4, {**again, "lr-decay-iters": 4})
    run_world(train_and_report, 1, values_of(folder, "whole", **EMA))
    assert_same_losses(
        [line for line in metrics(folder / "first half") if "event" not in line],
        [line for line in metrics(folder / "whole") if "event" not in line],
    )


@pytest.mark.slow
def test_a_tied_model_and_zero_2(folder: Path, tmp_path: Path) -> None:
    """A tied output weight is written once, by the stage that has the embedding."""
    write_corpus(tmp_path / "corpus")
    save_hf_llama(tmp_path / "model", tie_word_embeddings=True)
    saving = values_of(tmp_path, "pp2", **EMA, **PP2, save_interval=1)
    run_world(train_and_report, 2, {**saving, "train-iters": 1, "lr-decay-iters": 4})
    zero2 = {"deepspeed_config": "ds_configs/zero2_bf16.json", "load": tmp_path / "pp2" / "checkpoints"}
    run_world(train_and_report, 1, {**values_of(tmp_path, "pp2", **EMA, **zero2), "lr-decay-iters": 4})
    run_world(train_and_report, 1, values_of(tmp_path, "whole", **EMA))
    assert_same_losses(
        [line for line in metrics(tmp_path / "pp2") if "event" not in line],
        [line for line in metrics(tmp_path / "whole") if "event" not in line],
    )
