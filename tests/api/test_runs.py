"""Whole runs from Python, each in a process of its own: train, store scores, train with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import make_config, open_scores, score, train
from megatron_slm.errors import ConfigError
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus
from tests.support.world import run_world


def calls(flags: dict[str, Any], names: list[str], more: dict[str, Any], log: str) -> list[dict[str, Any]]:
    """The results of these calls, in a process that writes its errors and messages to `log`."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    results = []
    for name in names:
        if name == "score":
            score(flags, **more)
            assert open_scores(more["output"]).manifest.data.num_samples > 0
        else:
            results.append(train(flags, **more)._asdict())
    return results


def _call(folder: Path, flags: dict[str, Any], names: list[str], **more: Any) -> tuple[list[dict[str, Any]], str]:
    words = {name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}
    [results] = run_world(calls, 1, words, names, more, str(folder / "log"))
    return results, (folder / "log").read_text()


def test_train_and_train_from_stored_scores(tmp_path: Path) -> None:
    write_corpus(tmp_path / "web")
    save_hf_llama(tmp_path / "reference")
    flags = run_flags(tmp_path / "web", tmp_path / "live", objective="slm", reference_load=tmp_path / "reference")
    [finished], err = _call(tmp_path, flags, ["train"], train_iters=3, save_interval=3)
    lines = [line for line in recorded(tmp_path / "live") if "event" not in line]
    assert str(finished["run_dir"]) == str(tmp_path / "live")
    assert finished["step"] == 3
    assert finished["tokens_kept"] == sum(line["kept_tokens"] for line in lines)
    assert f"slm-convert export --load {tmp_path}/live/checkpoints" in err
    assert "kept 6" in err
    _call(tmp_path, {**flags, "train-iters": 3}, ["score"], output=str(tmp_path / "scores"))
    stored = {**flags, "reference-scores": [str(tmp_path / "scores")], "run-dir": tmp_path / "stored"}
    del stored["reference-load"]
    _, err = _call(tmp_path, stored, ["train"], train_iters=3, quiet=True)
    assert [line for line in recorded(tmp_path / "stored") if "event" not in line] == lines
    assert not any(word in err for word in ("tokens/s", "computing with", "finished"))


def test_configurations_by_name() -> None:
    config = make_config({"train-iters": 3, "objective": "clm", "slm-score": ["-loss"]}, lr=1e-4, bf16=True)
    assert config.optimizer.lr == 1e-4
    assert config.training.bf16
    assert config.selection.slm_score == ["-loss"]
    with pytest.raises(ConfigError, match=r"did you mean --train-iters\?"):
        make_config(trian_iters=3)
