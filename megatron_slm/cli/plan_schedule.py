"""`slm-plan schedule`: prints and draws a pipeline schedule for given costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_slm.engine.schedule.costs import Costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.programs import Schedule
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import Simulation, Sizes
from megatron_slm.errors import ConfigError


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `plan.py schedule`."""
    parser.add_argument("--stages", type=int, required=True, help="pipeline stages")
    parser.add_argument("--micro-batches", type=int, required=True, help="micro-batches of a step on one rank")
    names = [mode.value for mode in Mode]
    parser.add_argument("--mode", choices=names, default=Mode.SKEWED.value, help="mode to draw (default: %(default)s)")
    durations = parser.add_argument_group("durations on one stage, in any one unit")
    for name, default, text in (
        ("forward", 1.0, "the model's forward pass"),
        ("backward", 2.0, "its backward pass"),
        ("reference", 1.0, "the reference's forward pass"),
        ("head-forward", 0.0, "the loss head's share of the forward pass, on the last stage"),
        ("head-backward", 0.0, "its share of the backward pass"),
        ("head-reference", 0.0, "its share of the reference's forward pass"),
    ):
        durations.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default: {default})")
    durations.add_argument(
        "--row-share",
        type=float,
        default=1.0,
        help="share of the backward pass left by sampled rows; plain training takes all of it (default: 1.0)",
    )
    sizes = parser.add_argument_group("sizes of one micro-batch on one rank, in MiB")
    sizes.add_argument(
        "--activations-mib", type=float, default=0.0, help="activations a stage keeps for the backward pass"
    )
    sizes.add_argument(
        "--message-mib", type=float, default=0.0, help="message of the reference's hidden states between stages"
    )
    parser.add_argument("--png", type=Path, help="draw the schedule into this file")
    parser.set_defaults(run=plan_schedule)


def plan_schedule(args: argparse.Namespace) -> None:
    """Print the time of every mode and the stages of one mode, and draw that mode.

    Raises:
        ConfigError: a number is out of range.
    """
    for name in ("stages", "micro_batches", "forward", "backward", "reference"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(args, name), "be positive", "raise it")
    if not 0.0 < args.row_share <= 1.0:
        raise ConfigError("--row-share", args.row_share, "lie in (0, 1]", "use a share such as 0.7")
    costs = Costs.uniform(
        args.stages,
        forward=args.forward,
        backward=args.backward,
        reference=args.reference,
        head_forward=args.head_forward,
        head_backward=args.head_backward,
        head_reference=args.head_reference,
        row_share=args.row_share,
    )
    schedules = {mode: choose_schedule(mode, costs, args.micro_batches) for mode in Mode}
    sizes = Sizes(
        reference_message=round(args.message_mib * 2**20),
        stage_activations=round(args.activations_mib * 2**20),
        micro_batch=0,
        statistics=0,
    )
    console = Console()
    console.print(_modes_table(schedules))
    console.print(_stages_table(schedules[Mode(args.mode)], sizes))
    if args.png is not None:
        from megatron_slm.engine.schedule.picture import draw  # matplotlib: needed only for pictures

        draw(schedules[Mode(args.mode)], args.png)
        console.print(f"wrote {args.png}", highlight=False)


def _modes_table(schedules: dict[Mode, Schedule]) -> Table:
    table = Table(title="Schedules")
    for column in ("mode", "step / CLM's", "lower bound", "idle"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, schedule in schedules.items():
        simulation = Simulation(schedule)
        stages = range(schedule.num_stages)
        idle = sum(simulation.bubble_fraction(stage) for stage in stages) / len(stages)
        table.add_row(mode.value, f"{simulation.ratio:.3f}", f"{simulation.lower_bound:.3f}", f"{idle:.1%}")
    return table


def _stages_table(schedule: Schedule, sizes: Sizes) -> Table:
    simulation = Simulation(schedule)
    table = Table(title=f"{schedule.mode}, stage by stage")
    columns = "stage|idle|micro-batches ahead|activations kept|messages waiting|micro-batches held|MiB".split("|")
    for column in columns:
        table.add_column(column, justify="right")
    for stage in range(schedule.num_stages):
        table.add_row(
            str(stage),
            f"{simulation.bubble_fraction(stage):.1%}",
            str(schedule.leads[stage] if schedule.leads else 0),
            str(simulation.activations(stage)),
            str(simulation.unread(stage)),
            str(simulation.micro_batches_held(stage)),
            f"{simulation.memory_bytes(stage, sizes) / 2**20:,.1f}",
        )
    return table
