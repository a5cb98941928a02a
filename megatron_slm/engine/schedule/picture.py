"""Picture of a schedule: one row a stage, time to the right."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_slm.engine.schedule.costs import Work
from megatron_slm.engine.schedule.programs import Schedule
from megatron_slm.engine.schedule.simulate import Simulation

_LOOKS = {
    Work.FORWARD: ("#0072B2", "white", "model forward"),
    Work.BACKWARD: ("#E69F00", "black", "model backward"),
    Work.REFERENCE: ("#9AD6C1", "black", "reference forward (' : of the next step)"),
}
"""Fill, text and legend; the fills differ in hue and in lightness, for readers who do not tell hues apart."""


def draw(schedule: Schedule, path: Path) -> None:
    """Write a PNG of a step in the middle of a run."""
    simulation, num_stages, m = Simulation(schedule), schedule.num_stages, schedule.num_micro_batches
    unit = simulation.step_ticks / 100  # the axis is in percent of the step
    width = min(24.0, max(9.0, 0.28 * simulation.step_ticks / max(1, min(schedule.costs.forward))))
    figure = Figure(figsize=(width, 1.6 + 0.55 * num_stages), layout="constrained")
    axes = figure.add_subplot()
    size = max(4.0, min(10.0, 10.0 * (width / 9.0) * 3 * 8 / (m * 4)))
    for start, end, stage, (work, i) in schedule.events:
        fill, ink, _ = _LOOKS[work]
        axes.broken_barh(
            [(start / unit, (end - start) / unit)], (stage - 0.4, 0.8), facecolor=fill, edgecolor="white", linewidth=0.6
        )
        if (end - start) / unit * width > 1.6 * size:
            label = f"{i - m}'" if i >= m else str(i)
            axes.text((start + end) / 2 / unit, stage, label, ha="center", va="center", color=ink, fontsize=size)
    idle = [f"stage {stage}\n{simulation.bubble_fraction(stage):.0%} idle" for stage in range(num_stages)]
    axes.set_yticks(range(num_stages), idle)
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("time, % of the step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    used = {event.computation.work for event in schedule.events}
    axes.legend(
        handles=[Patch(color=fill, label=text) for work, (fill, _, text) in _LOOKS.items() if work in used],
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"{schedule.mode}: {num_stages} stages, {m} micro-batches; step {simulation.ratio:.3f} x CLM's "
        f"(lower bound {simulation.lower_bound:.3f})"
    )
    FigureCanvasAgg(figure).print_png(str(path))
