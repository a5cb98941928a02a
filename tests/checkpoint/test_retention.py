"""Which checkpoints stay, and that deleting them is safe."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.checkpoint.format import MANIFEST, complete_checkpoints, folder_name, step_of
from megatron_slm.checkpoint.retention import (
    EVALUATIONS,
    Retention,
    clear_leftovers,
    prune,
    read_evaluations,
    record_evaluation,
)

STEPS = [10, 20, 30, 40, 50, 60]


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / folder_name(step)).mkdir(parents=True)
        (folder / folder_name(step) / MANIFEST).touch()


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in complete_checkpoints(folder)]


@pytest.mark.parametrize(
    ("options", "losses", "expected"),
    [
        ({}, {}, STEPS),
        ({"keep_last": 1}, {}, [60]),
        ({"keep_last": 2}, {}, [50, 60]),
        ({"keep_last": 9}, {}, STEPS),
        ({"keep_last": 1, "retain_interval": 20}, {}, [20, 40, 60]),
        ({"keep_last": 2, "keep_best": "a"}, {10: 3.0, 20: 1.0, 30: 2.0}, [20, 50, 60]),
        ({"keep_last": 2, "keep_best": "a"}, {10: 1.0, 20: 1.0}, [20, 50, 60]),
        ({"keep_last": 2, "keep_best": "a"}, {15: 0.5, 30: 1.0}, [30, 50, 60]),
        ({"keep_last": 2, "keep_best": "a"}, {}, [50, 60]),
        ({"keep_last": 1, "retain_interval": 30, "keep_best": "a"}, {50: 1.0, 60: 1.5}, [30, 50, 60]),
    ],
)
def test_what_stays(options: dict, losses: dict[int, float], expected: list[int]) -> None:
    assert sorted(Retention(**options).kept(STEPS, losses)) == expected


@given(
    present=st.sets(st.integers(0, 50), min_size=1),
    last=st.integers(1, 5),
    interval=st.none() | st.integers(1, 9),
    losses=st.dictionaries(st.integers(0, 50), st.floats(0, 9)),
)
def test_what_stays_as_laws(present: set[int], last: int, interval: int | None, losses: dict[int, float]) -> None:
    kept = Retention(keep_last=last, retain_interval=interval, keep_best="a").kept(present, losses)
    assert max(present) in kept <= present
    assert set(sorted(present)[-last:]) <= kept
    assert all(step in kept for step in present if interval and step % interval == 0)
    evaluated = {step: losses[step] for step in present & set(losses)}
    assert not evaluated or min(evaluated.values()) == min(evaluated[step] for step in kept & set(evaluated))


def test_pruning_deletes_the_others_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, *STEPS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_00000005").mkdir()  # not complete: not ours to judge
    record_evaluation(tmp_path, 20, {"clean": 1.0, "noisy": 9.0})
    record_evaluation(tmp_path, 30, {"clean": 2.0, "noisy": 1.0})
    prune(tmp_path, Retention(keep_last=1, keep_best="clean"))
    assert steps(tmp_path) == [20, 60]
    assert sorted(os.listdir(tmp_path)) == [EVALUATIONS, "notes", "step_00000005", folder_name(20), folder_name(60)]


def test_a_deletion_that_is_killed_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10, 20)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, Retention(keep_last=1))
    assert steps(tmp_path) == [20]
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [folder_name(20)]


def test_what_cannot_be_deleted_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10, 20)

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refused)
    prune(tmp_path, Retention(keep_last=1))
    assert "step_00000010 (Permission denied)" in caplog.text
    assert steps(tmp_path) == [10, 20]


def test_a_deletion_that_cannot_be_ended_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a reader keeps the files alive; saves go on meanwhile."""
    write(tmp_path, 10, 20)

    def busy(*args: object, **kwargs: object) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else busy())
        prune(tmp_path, Retention(keep_last=1))
        clear_leftovers(tmp_path)
        assert "yet (Directory not empty)" in caplog.text
        (tmp_path / ".step_00000030.tmp").mkdir()
        with pytest.raises(OSError, match="Directory not empty"):
            clear_leftovers(tmp_path)
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [folder_name(20)]


def test_losses_read_back_and_those_without_a_checkpoint_go(tmp_path: Path) -> None:
    write(tmp_path, 10, 30)
    record_evaluation(tmp_path, 10, {"a": 0.1 + 0.2, "b": None})
    record_evaluation(tmp_path, 20, {"a": 2.0})
    assert read_evaluations(tmp_path) == {"a": {10: 0.1 + 0.2, 20: 2.0}}
    record_evaluation(tmp_path, 30, {"a": 3.0, "b": 4.0})
    assert read_evaluations(tmp_path) == {"a": {10: 0.1 + 0.2, 30: 3.0}, "b": {30: 4.0}}
    record_evaluation(tmp_path, 20, {"a": 5.0})  # a run that went back
    assert read_evaluations(tmp_path) == {"a": {10: 0.1 + 0.2, 20: 5.0}, "b": {}}


def test_losses_that_cannot_be_read_are_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("{", "[1]", json.dumps({"a": {"x": 1}}), json.dumps({"a": {"1": None}})):
        (tmp_path / EVALUATIONS).write_text(text)
        assert read_evaluations(tmp_path) == {}
        assert "ignoring earlier held-out losses" in caplog.text
        caplog.clear()


def test_the_loss_of_a_checkpoint_that_is_still_written_stays(tmp_path: Path) -> None:
    record_evaluation(tmp_path, 2, {"web": 1.0}, pending={2})
    record_evaluation(tmp_path, 3, {"web": 2.0}, pending={2})
    assert read_evaluations(tmp_path)["web"] == {2: 1.0, 3: 2.0}
    record_evaluation(tmp_path, 4, {"web": 3.0})
    assert read_evaluations(tmp_path)["web"] == {4: 3.0}
