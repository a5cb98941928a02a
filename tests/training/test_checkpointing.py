"""Saving during training: once a step, and never where the run does not save."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slm.checkpoint.save import Saved
from megatron_slm.checkpoint.state import RunState
from megatron_slm.training.checkpointing import Checkpointer
from megatron_slm.training.intervals import is_due


class Fakes:
    """Saver, recorder and watchdog that remember what they were asked."""

    def __init__(self) -> None:
        self.saved_steps: list[int] = []
        self.logged: list[str] = []
        self.states: list[Any] = []
        self.under_way: Saved | None = None

    def save(self, optimizer: Any, state: RunState, more: Any) -> Saved:
        self.saved_steps.append(state.step)
        return Saved(Path(f"step_{state.step}"), 3 * 2**20, 0.25)

    def poll(self) -> Saved | None:
        return self.under_way

    def finish(self) -> Saved | None:
        return self.under_way

    def log(self, text: str) -> None:
        self.logged.append(text)

    def enter(self, state: Any, step: int) -> None:
        self.states.append((state.value, step))


def checkpointer(fakes: Fakes, state: RunState, *, enabled: bool = True) -> Checkpointer:
    run: Any = SimpleNamespace(
        state=state,
        following=None,
        saver=fakes,
        trainer=SimpleNamespace(engine=SimpleNamespace(optimizer=None)),
        plan=SimpleNamespace(config=SimpleNamespace(checkpoint=SimpleNamespace(enabled=enabled))),
    )
    return Checkpointer(run, fakes, fakes)  # type: ignore[arg-type]


def test_a_step_is_saved_once() -> None:
    fakes, state = Fakes(), RunState(step=4)
    checkpoints = checkpointer(fakes, state)
    checkpoints.save()
    checkpoints.save()
    state.step = 5
    checkpoints.save()
    assert fakes.saved_steps == [4, 5]
    assert fakes.states == [("saving", 4), ("saving", 5)]
    assert fakes.logged[0] == "saved step_4 (3 MiB, blocked 0.25 s)"


def test_a_commit_is_logged_when_it_is_known() -> None:
    fakes = Fakes()
    checkpoints = checkpointer(fakes, RunState(step=4))
    checkpoints.poll()
    assert not fakes.logged
    fakes.under_way = Saved(Path("step_3"), 2**20, 0.5)
    checkpoints.poll()
    checkpoints.finish()
    assert fakes.logged == ["saved step_3 (1 MiB, blocked 0.50 s)"] * 2


def test_a_run_without_saves_saves_nothing() -> None:
    fakes = Fakes()
    checkpointer(fakes, RunState(step=4), enabled=False).save()
    assert (fakes.saved_steps, fakes.states) == ([], [])


@pytest.mark.parametrize(
    ("interval", "due"), [(None, [9]), (3, [3, 6, 9]), (4, [4, 8, 9]), (1, [1, 2, 3, 4, 5, 6, 7, 8, 9])]
)
def test_intervals_and_the_last_step(interval: int | None, due: list[int]) -> None:
    assert [step for step in range(1, 10) if is_due(step, interval, 9)] == due
