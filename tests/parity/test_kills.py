"""A run that is killed again and again ends in the bits, and tells the history, of one that never was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint.format import Manifest, complete_checkpoints, step_of, verify_files
from tests.parity.test_resume import assert_bit_equal, metrics
from tests.support.kills import random_kill, timed_training, train_and_be_killed
from tests.support.runs import run_flags, write_corpus
from tests.support.training import train_and_report
from tests.support.world import WorldError, run_world

NUM_STEPS = 16


class Runs:
    """One run that nobody disturbs, and the flags of others like it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus")
        write_corpus(folder / "clean", seed=1, num_documents=4)
        timed = run_world(timed_training, 2, self.values("straight"))
        self.straight, self.seconds = [report for report, _ in timed], timed[0][1]
        self.metrics = metrics(folder / "straight")

    def values(self, name: str, **changes: Any) -> dict[str, Any]:
        common = {
            "train_iters": NUM_STEPS, "save_interval": 2, "eval_interval": 2, "pipeline_model_parallel_size": 2,
            "valid_data_path": f"clean={self.folder / 'clean'}",
        }  # fmt: skip
        return run_flags(self.corpus, self.folder / name, **{**common, **changes})

    def killed(self, name: str, generator: random.Random) -> bool:
        """One life of a run that starts or resumes by itself; False where it was over before the kill."""
        folder = self.folder / name / "checkpoints"
        asynchronous = generator.random() < 0.5 or None
        values = self.values(name, load=folder, keep_last=2, keep_best="clean", async_save=asynchronous)
        kill = random_kill(generator, 2, seconds=(0.15 * self.seconds, 0.9 * self.seconds))
        failure: WorldError | None = None
        try:
            run_world(train_and_be_killed, 2, values, kill)
        except WorldError as error:
            failure = error
        if failure is not None:
            assert any(failure.codes[rank] == -9 for rank in kill.ranks), f"{kill}: {failure}"
        self.check(folder)
        return failure is not None

    def check(self, folder: Path) -> None:
        """The newest complete checkpoint has the bytes of the undisturbed run's of that step."""
        found = complete_checkpoints(folder)
        for path in found:
            manifest = Manifest.read(path)
            verify_files(path, manifest)
            whole = Manifest.read(self.folder / "straight" / "checkpoints" / path.name)
            of_tensors = [
                {name: entry for name, entry in m.files.items() if name.endswith(".safetensors")}
                for m in (manifest, whole)
            ]
            assert of_tensors[0] == of_tensors[1], path
            assert (manifest.step, manifest.state.consumed_samples) == (whole.step, whole.state.consumed_samples)

    def resumed_to_the_end(self, name: str) -> None:
        """Resume once more, undisturbed: the same weights, random states and history."""
        folder = self.folder / name / "checkpoints"
        resumed = run_world(train_and_report, 2, self.values(name, load=folder, keep_last=2))
        for one, other in zip(self.straight, resumed, strict=True):
            other["kept"] = other["kept"] or one["kept"]  # the run may have been over
        assert_bit_equal(self.straight, resumed)
        assert metrics(self.folder / name) == self.metrics
        self.check(folder)
        steps = [step_of(path) for path in complete_checkpoints(folder)]
        assert steps[-2:] == [NUM_STEPS - 2, NUM_STEPS]
        assert not list(folder.glob(".step_*")), "what killed saves left was cleared"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


def test_ten_kills_one_after_another(runs: Runs) -> None:
    generator, kills, number = random.Random(30), 0, 0
    while kills < 10:
        was_killed = runs.killed(f"chain{number}", generator)
        kills += was_killed
        if not was_killed or kills == 10:
            runs.resumed_to_the_end(f"chain{number}")
            number += 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_each_resumed_to_the_end(runs: Runs) -> None:
    generator, kills, number = random.Random(100), 0, 0
    while kills < 100:
        kills += runs.killed(f"single{number}", generator)
        runs.resumed_to_the_end(f"single{number}")
        number += 1
