"""Requests to stop: all ranks stop after the same step, save it, and resume from it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint import save
from megatron_slm.checkpoint.format import complete_checkpoints, find_checkpoint
from megatron_slm.checkpoint.retention import read_evaluations
from megatron_slm.config.resilience import STOP_FILE
from megatron_slm.engine.pipeline import SelectiveEngine
from megatron_slm.flags.load import parse
from megatron_slm.operations import stopping
from megatron_slm.training.pretrain import pretrain
from tests.parity.test_resume import metrics
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
    return pretrain(config, observer=observe).state.step


def train_and_signal(values: dict[str, Any], rank: int, where: str, moment: int, number: int) -> int:
    """The step that a run stops after whose `rank` gets a signal when it does `where` for the `moment`th time."""
    owner: Any = {"evaluate": SelectiveEngine, "write_tensor_file": save, "commit": save.Writer}[where]
    count = 0

    def struck(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        return call

    setattr(owner, where, struck(getattr(owner, where)))
    return train(values)


def train(values: dict[str, Any]) -> int:
    config, _ = parse(flags(values))
    return pretrain(config).state.step


class Runs:
    """The flags of runs of two stages that evaluate a set of several batches, and save."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, write_corpus(folder / "corpus")
        write_corpus(folder / "clean", seed=1, num_documents=20)

    def values(self, name: str, **changes: Any) -> dict[str, Any]:
        common = {
            "train_iters": 6, "save_interval": 4, "pipeline_model_parallel_size": 2, "eval_interval": 2,
            "valid_data_path": f"clean={self.folder / 'clean'}",
        }  # fmt: skip
        return run_flags(self.corpus, self.folder / name, **{**common, **changes})

    def saved(self, name: str) -> list[str]:
        return [path.name for path in complete_checkpoints(self.folder / name / "checkpoints")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("stopping"))
    assert run_world(train, 2, made.values("straight")) == [6, 6]
    return made


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


def test_in_an_evaluation(runs: Runs) -> None:
    """It is broken off, the step before it is saved, and the resumed run makes up for it."""
    values = runs.values("evaluation")
    assert run_world(train_and_signal, 2, values, 1, "evaluate", 1, signal.SIGUSR1) == [2, 2]
    assert runs.saved("evaluation") == ["step_00000002"]
    assert [line for line in metrics(runs.folder / "evaluation") if "event" in line] == []
    load = runs.folder / "evaluation" / "checkpoints"
    assert run_world(train, 2, {**values, "load": load}) == [6, 6]
    assert metrics(runs.folder / "evaluation") == metrics(runs.folder / "straight")


def test_between_two_sets(runs: Runs) -> None:
    """What was evaluated before it was asked to stop counts for the best checkpoint, as the other set does later."""
    sets = [f"first={runs.folder / 'clean'}", f"second={runs.folder / 'clean'}"]
    values = runs.values("sets", valid_data_path=sets, eval_iters=2)
    assert run_world(train_and_signal, 2, values, 0, "evaluate", 2, signal.SIGUSR1) == [2, 2]
    saved = runs.folder / "sets" / "checkpoints"
    assert {name: list(losses) for name, losses in read_evaluations(saved).items()} == {"first": [2]}
    assert run_world(train, 2, {**values, "load": saved}) == [6, 6]
    found = read_evaluations(saved)
    assert found["first"] == found["second"]
    assert sorted(found["first"]) == [2, 4, 6]


@pytest.mark.parametrize(
    ("where", "rank", "asynchronous"),
    [("write_tensor_file", 1, False), ("commit", 0, False), ("write_tensor_file", 0, True)],
)
def test_in_a_save(where: str, rank: int, asynchronous: bool, runs: Runs) -> None:
    name = f"{where}{rank}{asynchronous}"
    values = runs.values(name, eval_interval=100, async_save=asynchronous or None)
    stopped = run_world(train_and_signal, 2, values, rank, where, 1, signal.SIGTERM)
    # one step more at most; the save that it came in is whole, and so is that of the last step
    assert stopped in ([4, 4], [5, 5])
    assert runs.saved(name) == ["step_00000004", "step_00000005"][: stopped[0] - 3]
    assert not list((runs.folder / name / "checkpoints").glob(".*tmp"))


def test_the_file(runs: Runs) -> None:
    """Before the first step: nothing is trained, and the file is used up."""
    values = runs.values("file")
    (runs.folder / "file").mkdir()
    (runs.folder / "file" / STOP_FILE).touch()
    assert run_world(train, 2, values) == [0, 0]
    assert run_world(train, 2, values) == [6, 6]


def test_exit_interval(runs: Runs) -> None:
    """Counted in steps of the run, not of the process; the last step ends the run as ever."""
    values = runs.values("interval", exit_interval=3, load=runs.folder / "interval" / "checkpoints")
    assert run_world(train, 2, values) == [3, 3]
    assert runs.saved("interval") == ["step_00000003"]
    assert run_world(train, 2, values) == [6, 6]
    assert metrics(runs.folder / "interval") == metrics(runs.folder / "straight")


def train_by_two_clocks(values: dict[str, Any]) -> int:
    """As if rank 1 had run for an hour and rank 0 come to be late in the third step."""
    asked = 0

    def minutes() -> float:
        nonlocal asked
        asked += 1
        return 60.0 if int(os.environ["RANK"]) == 1 or asked == 3 else 0.5

    stopping._process_minutes = minutes
    return train(values)


def test_exit_duration_is_rank_0s(runs: Runs) -> None:
    assert run_world(train_by_two_clocks, 2, runs.values("duration", exit_duration_in_mins=30)) == [3, 3]
    assert runs.saved("duration") == ["step_00000003"]


def train_without_a_launcher(values: dict[str, Any]) -> int:
    """As if the launcher of rank 1 ended in the second step."""
    asked = 0

    def is_gone(self: Any) -> bool:
        nonlocal asked
        asked += 1
        return int(os.environ["RANK"]) == 1 and asked >= 3

    stopping._Launcher.is_gone = is_gone  # type: ignore[method-assign]
    return train(values)


def test_a_launcher_that_is_gone(runs: Runs) -> None:
    assert run_world(train_without_a_launcher, 2, runs.values("launcher", eval_interval=100)) == [2, 2]


@pytest.mark.parametrize(("module", "ends"), [("torch.distributed.run", True), ("some.shell", False)])
def test_only_a_launcher_is_missed(module: str, ends: bool, tmp_path: Path) -> None:
    """Runs may outlive the shell that they were started from."""
    child = f"""
import os, sys, time
from pathlib import Path
from megatron_slm.operations.stopping import _Launcher
launcher = _Launcher()
assert not launcher.is_gone()
Path("{tmp_path}/ready").touch()
while os.getppid() == {{parent}}:
    time.sleep(0.05)
Path("{tmp_path}/answer").write_text(str(launcher.is_gone()))
"""
    # a parent whose command line has the module's name in it, as a launcher's has
    code = f"""
import os, subprocess, sys, time
from pathlib import Path
child = {child!r}.replace("{{parent}}", str(os.getpid()))
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
while not Path("{tmp_path}/ready").exists():
    time.sleep(0.05)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-X", module, str(script)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "answer").exists() or not (tmp_path / "answer").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "answer").read_text() == str(ends)
