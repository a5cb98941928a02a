"""Evaluation before the first step and alone: the losses of the weights that are there, and no trace in a run's records."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.load import parse
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.run.plan import make_plan
from megatron_slm.run.resume import open_resume
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags, recorded, run_flags, write_corpus
from tests.support.world import run_world


def run_all(runs: list[dict[str, Any]]) -> list[bytes]:
    """Run trainings one after another in one world; a digest of each one's weights on this rank."""
    digests = []
    for values in runs:
        run = pretrain(parse(flags(values))[0])
        weights = [p.detach().numpy().tobytes() for p in run.trainer.engine.module.parameters()]
        digests.append(hashlib.sha256(b"".join(weights)).digest())
    return digests


def losses(run_dir: Path, step: int) -> list[float]:
    """The held-out losses recorded at a step, in the order of the file."""
    return [line["loss"] for line in recorded(run_dir) if line.get("event") == "eval" and line["step"] == step]


def test_evaluations_beside_a_training(tmp_path: Path) -> None:
    corpus, held = write_corpus(tmp_path / "corpus"), write_corpus(tmp_path / "held", seed=1, num_documents=5)

    def values(name: str, **changes: Any) -> dict[str, Any]:
        common = {
            "num_layers": 2,
            "train_iters": 2,
            "pipeline_model_parallel_size": 2,
            "valid_data_path": f"held={held}",
        }
        return run_flags(corpus, tmp_path / name, **{**common, **changes})

    saved = tmp_path / "plain" / "checkpoints"
    alone = {"eval_only": True, "load": saved / "step_00000001", "train_iters": None, "save_interval": 1}
    plain = values("plain", eval_interval=1, save_interval=1)
    digests = run_world(
        run_all,
        2,
        [plain, values("start", eval_interval=1, eval_at_start=True), values("frozen", lr=0, eval_at_start=True)],
    )[0]
    before = {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.*")}
    run_world(run_all, 2, [values("plain", **alone), values("fresh", eval_only=True)])

    evaluated = losses(tmp_path / "plain", 1)
    assert len(evaluated) == 2
    assert evaluated[0] == evaluated[1], "alone: the loss that training recorded after that step"
    after = {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.*")}
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl")), "later lines stay"
    assert after == before
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_00000001", "step_00000002"]

    (at_start,) = losses(tmp_path / "start", 0)
    assert losses(tmp_path / "fresh", 0) == [at_start]
    assert losses(tmp_path / "frozen", 0) == losses(tmp_path / "frozen", 2) == [at_start], "nothing is learnt at --lr 0"
    assert losses(tmp_path / "start", 2) != [at_start]
    assert [line for line in recorded(tmp_path / "start") if line["step"]] == [
        line for line in recorded(tmp_path / "plain")[:-1]
    ], "evaluating first changes nothing"
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", eval_only=True)
    with pytest.raises(ConfigError, match="--valid-data-path is missing: required by --eval-only"):
        make_plan(parse(flags(values))[0], 1)


@pytest.mark.parametrize("where", ["run/checkpoints", "elsewhere"])
def test_alone_it_needs_the_checkpoint_that_is_named(where: str, tmp_path: Path) -> None:
    values = run_flags(
        tmp_path / "corpus", tmp_path / "run", save_interval=1, load=tmp_path / where, skip_train=True, train_iters=None
    )
    with pytest.raises(CheckpointError, match="contain a complete checkpoint"):
        open_resume(parse(flags(values))[0])
