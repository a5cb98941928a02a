"""A signal to one rank stops all of them after the same step, with a checkpoint of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.config.load import parse
from megatron_slm.training.main import pretrain
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import run_world


def train_until_killed(values: dict[str, Any], at_micro_batch: int) -> int:
    seen = 0

    def observe(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at_micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # DeepSpeed's launcher sends it again

    config, _ = parse(flags(values))
    return pretrain(config, observer=observe).position.step


def test_sigterm_to_one_rank(tmp_path: Path) -> None:
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=50, save_interval=40,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    # the observer runs on the last stage only: rank 1 alone is sent the signal, in the third step
    assert run_world(train_until_killed, 2, values, 4 * 2 + 1) == [3, 3]
    assert find_checkpoint(tmp_path / "run" / "checkpoints").name == "step_00000003"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
