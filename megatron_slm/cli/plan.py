"""`slm-plan`: plans a run's memory, speed and layout (`layout`, `search`) and its pipeline schedule (`schedule`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.cli.plan_schedule import add_schedule
from megatron_slm.errors import LayoutError
from megatron_slm.files import write_json
from megatron_slm.flags.load import parse
from megatron_slm.planning.gpus import GPUS, HOST_GIB_PER_GPU, Cluster

if TYPE_CHECKING:
    from megatron_slm.config.run import RunConfig
    from megatron_slm.planning.planned_run import PlannedRun


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix (a layout that does not fit is one)."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    parser = ToolParser("Plan a run before it is started. Needs no GPU, no weights and no corpus.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_schedule(commands.add_parser("schedule", help="time, idle time and memory of the pipeline's schedules"))
    _add_layout(commands)
    _add_search(commands)
    args, run_flags = parser.parse_known_args(words)
    if run_flags and args.run not in (plan_layout, plan_search):
        parser.error(f"unrecognized arguments: {' '.join(run_flags)}")
    if args.run in (plan_layout, plan_search):  # before torch is imported: a refused flag costs no seconds
        args.run_config = _run_config(args, run_flags)
    choose_accelerator()
    args.run(args)


def _add_layout(commands: argparse._SubParsersAction[ToolParser]) -> None:
    parser = commands.add_parser(
        "layout",
        help="memory by part, step time and duration of the configured layout",
        description="Print memory per rank by part, step time, tokens per second, days and GPU-hours of the configured "
        "layout. Further flags are the run's own (see pretrain_slm.py --help) and override the file.",
    )
    _add_common(parser)
    parser.set_defaults(run=plan_layout)


def _add_search(commands: argparse._SubParsersAction[ToolParser]) -> None:
    parser = commands.add_parser(
        "search",
        help="the fastest layouts that fit",
        description="Try every layout, micro-batch size, ZeRO stage and recomputation at the configured global batch "
        "size, and print the fastest that fit. Further flags are the run's own.",
    )
    _add_common(parser)
    parser.add_argument("--top", type=int, default=8, help="layouts to show (default: %(default)s)")
    parser.set_defaults(run=plan_search)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file of the run (default: the run's flags alone)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node (default: %(default)s)")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="GPU model")
    models = parser.add_argument_group("models whose folders are not on this machine")
    what = "a config.json, a folder with one, one of our checkpoints, or a name such as llama-2-7b"
    models.add_argument("--model-config", metavar="PATH", help=f"{what}; default: --init-from, or the model's flags")
    models.add_argument("--reference-config", metavar="PATH", help=f"{what}; default: --reference-load")
    assumed = parser.add_argument_group("assumptions (see docs/planning.md)")
    for name, text in (
        ("efficiency", "share of the GPU's peak FLOP/s reached in forward and backward passes, as measured"),
        ("link-efficiency", "share of the link bandwidth reached by collectives"),
        ("memory-share", "share of GPU memory available to tensors"),
    ):
        default = getattr(Cluster, name.replace("-", "_"))
        shown = "from a roofline model" if default is None else default
        assumed.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default: {shown})")
    assumed.add_argument(
        "--host-memory",
        type=float,
        metavar="GIB",
        help=f"host memory of a node, where its ranks build the models (default: {HOST_GIB_PER_GPU} GiB a GPU)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan as JSON; - prints JSON only")


def _open(args: argparse.Namespace) -> tuple[PlannedRun, Cluster]:
    from megatron_slm.planning.planned_run import plan_run

    cluster = Cluster(
        gpu=GPUS[args.gpu],
        num_nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        efficiency=args.efficiency,
        link_efficiency=args.link_efficiency,
        memory_share=args.memory_share,
        host_memory=args.host_memory,
    )
    run = plan_run(args.run_config, model_config=args.model_config, reference_config=args.reference_config)
    return run, cluster


def _run_config(args: argparse.Namespace, run_flags: Sequence[str]) -> RunConfig:
    config, _ = parse(run_flags if args.config is None else ["--config", args.config, *run_flags])
    selection = config.selection
    if args.reference_config and selection.objective == "slm" and not selection.reference_scores:
        loaded = selection.reference_load or args.reference_config  # a plan needs its shape only
        config = replace(config, selection=replace(selection, reference_load=loaded))
    return config


def _console() -> Console:
    """Build a console wide enough for the tables even if the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def plan_layout(args: argparse.Namespace) -> None:
    """Print the plan of the configured layout.

    Raises:
        LayoutError: it does not fit; raised after the tables, which show the memory by part.
    """
    from megatron_slm.planning.estimates import estimate
    from megatron_slm.planning.layouts import configured_layout
    from megatron_slm.planning.tables import memory_table, speed_table

    run, cluster = _open(args)
    planned = estimate(run, configured_layout(run, cluster.num_gpus), cluster)
    if args.json != "-":
        console = _console()
        console.print(memory_table(planned, args.gpu))
        console.print(speed_table(planned, args.gpu))
    _write_json(args.json, planned.to_dict(), args)
    planned.building.check(cluster)
    if not planned.fits:
        raise LayoutError(
            "memory per rank",
            f"{planned.peak_bytes / 2**30:.1f} GiB",
            f"be at most {cluster.usable_bytes / 2**30:.1f} GiB ({cluster.memory_share:.0%} of {args.gpu})",
            "see `plan.py search` for layouts that fit",
        )


def plan_search(args: argparse.Namespace) -> None:
    """Print the best layouts.

    Raises:
        LayoutError: no layout fits.
    """
    from megatron_slm.planning.estimates import search
    from megatron_slm.planning.tables import search_table

    if args.top < 1:
        raise LayoutError("--top", args.top, "be at least 1", "raise it")
    run, cluster = _open(args)
    found = search(run, cluster, num_results=args.top)
    if args.json != "-":
        _console().print(search_table(found, args.gpu))
    _write_json(args.json, {"layouts": [planned.to_dict() for planned in found]}, args)


def _write_json(path: str | None, plan: dict[str, object], args: argparse.Namespace) -> None:
    if path is None:
        return
    names = ("gpu", "nodes", "gpus_per_node", "efficiency", "link_efficiency", "memory_share", "host_memory")
    write_json(path, {"assumed": {name: getattr(args, name) for name in names}, **plan})
