"""Modes and the flag that chooses one."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from megatron_slm.config.parallel import ParallelConfig
from megatron_slm.engine.schedule.costs import Costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.search import choose_schedule


def test_the_flag_offers_every_mode_with_a_reference() -> None:
    flag = get_type_hints(ParallelConfig)["reference_schedule"]
    assert {Mode(value) for value in get_args(flag)} == set(Mode) - {Mode.CLM}


@pytest.mark.parametrize("flag", [mode.value for mode in Mode if mode is not Mode.CLM])
def test_the_mode_of_a_run(flag: str) -> None:
    assert Mode.of_run(flag, num_stages=2, has_reference=True) is Mode(flag)
    assert Mode.of_run(flag, num_stages=1, has_reference=True) is Mode.RIDE_ALONG
    for num_stages in (1, 2):
        assert Mode.of_run(flag, num_stages=num_stages, has_reference=False) is Mode.CLM


@pytest.mark.parametrize("mode", Mode)
def test_modes_that_work_ahead_are_those_with_leads(mode: Mode) -> None:
    schedule = choose_schedule(mode, Costs.uniform(3), 6)
    assert schedule.mode is mode
    assert (schedule.leads is None) == (mode is Mode.CLM)
    assert any(schedule.leads or ()) == any(schedule.prologue) == mode.works_ahead
    assert f"{mode}" == mode.value
