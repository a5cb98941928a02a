"""What a schedule is said to cost, checked against schedules that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.cli.plan import main
from megatron_slm.engine.schedule.costs import Costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.picture import draw
from megatron_slm.engine.schedule.programs import Kind
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import Simulation, Sizes, describe

SIZES = Sizes(reference_message=1000, micro_batch=100, statistics=10, stage_activations=10_000)


def test_one_forward_one_backward() -> None:
    """4 stages, 8 micro-batches, backward twice the forward: 11 of 8 slots, so 3/11 idle on every stage."""
    clm = Simulation(choose_schedule(Mode.CLM, Costs.uniform(4), 8))
    assert (clm.step_ticks, clm.ratio, clm.lower_bound) == (330_000, 1.0, 1.0)
    assert [clm.bubble_fraction(stage) for stage in range(4)] == pytest.approx([3 / 11] * 4)
    assert [clm.activations(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [clm.unread(stage) for stage in range(4)] == [0] * 4
    assert [clm.micro_batches_held(stage) for stage in range(4)] == [1, 0, 0, 1]
    assert clm.memory_bytes(1, SIZES) == 30_000


def test_sequential() -> None:
    """2 stages, 2 micro-batches, all on the last stage after the first's: R R then 1F1B."""
    simulation = Simulation(choose_schedule(Mode.SEQUENTIAL, Costs.uniform(2), 2))
    assert simulation.step_ticks == 110_000  # 90,000 of the model, 20,000 of the reference before it
    assert [simulation.micro_batches_held(stage) for stage in range(2)] == [2, 2]
    assert simulation.unread(1) == 1
    assert simulation.memory_bytes(1, SIZES) == 10_000 + 1000 + 2 * 110


def test_working_ahead_holds_more() -> None:
    simulation = Simulation(choose_schedule(Mode.SKEWED, Costs.uniform(4), 8))
    assert simulation.ratio == 1.0
    assert simulation.micro_batches_held(0) >= 8
    assert max(simulation.unread(stage) for stage in range(4)) <= Costs.uniform(4).max_unread
    text = describe(simulation.schedule, "counted", SIZES)
    for expected in ("skewed (costs counted)", "1.000 x CLM's", "bound 1.000", "[8, 7, 6, 5]", "MiB a rank"):
        assert expected in text, text


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.CLM])
@pytest.mark.parametrize("costs", [Costs.uniform(4), Costs.uniform(3, reference=0.3), Costs.uniform(2, reference=2)])
def test_waiting_messages_are_those_of_the_programs(costs: Costs, mode: Mode) -> None:
    schedule = choose_schedule(mode, costs, 8)
    assert schedule.leads is not None
    for stage, program in enumerate(schedule.step):
        waiting = schedule.leads[stage - 1] - schedule.leads[stage] if stage else 0
        counts = [waiting]
        for kind, _ in program:
            waiting += kind is Kind.RECV_REFERENCE_ACTIVATION
            waiting -= kind is Kind.REFERENCE_FORWARD and stage > 0
            counts.append(waiting)
        assert Simulation(schedule).unread(stage) == max(counts), stage


def test_the_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw(choose_schedule(Mode.SKEWED, Costs.uniform(2), 4), tmp_path / "schedule.png")
    pixels = (imread(tmp_path / "schedule.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    colours = {tuple(pixel) for pixel in pixels.tolist()}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0x9A, 0xD6, 0xC1)} <= colours


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "schedule --stages 4 --micro-batches 8 --message-mib 2 --activations-mib 100".split()
    assert main([*flags, "--png", str(tmp_path / "schedule.png")]) == 0
    text = capsys.readouterr().out
    for expected in ("ride-along", "1.242", "1.000", "27.3%", "skewed, stage by stage"):
        assert expected in text, text
    assert (tmp_path / "schedule.png").stat().st_size > 1000


@pytest.mark.parametrize("flag", ["--stages", "--micro-batches", "--reference"])
def test_what_cannot_be_planned_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"--stages": "2", "--micro-batches": "4", flag: "0"}
    assert main(["schedule", *(word for item in values.items() for word in item)]) == 1
    assert f"error: {flag} is 0" in capsys.readouterr().err
