"""Whole runs from Python, each in a process of its own: train, store scores, train with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm import make_config
from megatron_slm.errors import ConfigError
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus

CALLS = """
import json, sys
from megatron_slm import open_scores, score, train
flags, more, calls = json.loads(sys.argv[1])
for call in calls:
    if call == "score":
        score(flags, **more)
        assert open_scores(more["output"]).manifest.data.num_samples > 0
    else:
        print(json.dumps(train(flags, **more)._asdict(), default=str))
"""


def _call(flags: dict[str, object], calls: list[str], **more: object) -> tuple[str, str]:
    words = json.dumps([{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}, more, calls])
    done = subprocess.run([sys.executable, "-c", CALLS, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_train_and_train_from_stored_scores(tmp_path: Path) -> None:
    write_corpus(tmp_path / "web")
    save_hf_llama(tmp_path / "reference")
    flags = run_flags(tmp_path / "web", tmp_path / "live", objective="slm", reference_load=tmp_path / "reference")
    out, err = _call(flags, ["train"], train_iters=3, save_interval=3)
    finished = json.loads(out)
    lines = [line for line in recorded(tmp_path / "live") if "event" not in line]
    assert finished["run_dir"] == str(tmp_path / "live")
    assert finished["step"] == 3
    assert finished["tokens_kept"] == sum(line["kept_tokens"] for line in lines)
    assert f"slm-convert export --load {tmp_path}/live/checkpoints" in err
    assert "kept 6" in err
    _call({**flags, "train-iters": 3}, ["score"], output=str(tmp_path / "scores"))
    stored = {**flags, "reference-scores": [str(tmp_path / "scores")], "run-dir": tmp_path / "stored"}
    del stored["reference-load"]
    _, err = _call(stored, ["train"], train_iters=3, quiet=True)
    assert [line for line in recorded(tmp_path / "stored") if "event" not in line] == lines
    assert not any(word in err for word in ("tokens/s", "computing with", "finished"))


def test_configurations_by_name() -> None:
    config = make_config({"train-iters": 3, "objective": "clm", "slm-score": ["-loss"]}, lr=1e-4, bf16=True)
    assert config.optimizer.lr == 1e-4
    assert config.training.bf16
    assert config.selection.slm_score == ["-loss"]
    with pytest.raises(ConfigError, match=r"did you mean --train-iters\?"):
        make_config(trian_iters=3)
