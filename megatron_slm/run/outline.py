"""Prints the outline of a run from its configuration alone, without weights, tokenizer and corpora."""

from __future__ import annotations

from rich.console import Console

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.run import RunConfig
from megatron_slm.engine.schedule.simulate import Simulation
from megatron_slm.planning.layouts import configured_layout
from megatron_slm.planning.memory import stage_memory
from megatron_slm.planning.planned_run import PlannedRun, plan_run
from megatron_slm.planning.tables import stage_memory_table
from megatron_slm.run.backward_checks import check_backward_rows
from megatron_slm.run.checks import check_ranks, warn_of_long_sequences
from megatron_slm.run.dry_run import batch_rows, layout_table, rows_table
from megatron_slm.run.layout import check_layout
from megatron_slm.run.schedule import counted_schedule


def print_outline(config: RunConfig, world_size: int) -> None:
    """Validate flags, layout, shapes and batches for a world, and print them with memory and schedule.

    Raises:
        SlmError: an error of the run itself that is found without files.
    """
    run = plan_run(config)
    layout = configured_layout(run, world_size)
    topology = layout.topology
    check_layout(run.architecture, config, topology, what="model")
    for reference in run.references:
        check_layout(reference, config, topology, what="reference")
    check_backward_rows(config, run.selector, run.architecture)
    check_ranks(config, topology)
    ds_config.resolve(
        run.deepspeed, config, data_parallel_size=topology.copies, num_micro_batches=layout.num_micro_batches
    )
    warn_of_long_sequences(config, run.architecture, run.references)
    schedule = counted_schedule(
        config, run.architecture, run.references, layout.pipeline, layout.num_micro_batches, keep_ratio=run.keep_ratio
    )
    simulation = Simulation(schedule)
    rows = batch_rows(config, topology, run.selector)
    if run.reference is not None:
        rows["reference schedule"] = f"{schedule.mode}, predicted step {simulation.ratio:.2f} x plain training's"
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(layout_table(config, topology, layout.zero_stage, run.architecture, run.references))
    console.print(rows_table("Batches and tokens", rows))
    console.print(
        stage_memory_table(
            stage_memory(run, layout, simulation),
            title="Memory per rank in GiB",
            caption="Of tensors, as planned (docs/planning.md); CUDA, NCCL and fragments come on top.",
        )
    )
    console.print(rows_table("Not checked", _not_checked(run)))
    console.print("The configuration is sound without these files; nothing was trained.")


def _not_checked(run: PlannedRun) -> dict[str, str]:
    """Paths of a run's files, by flag."""
    config = run.config
    data, selection = config.data, config.selection
    named: dict[str, list[str | None] | list[str]] = {
        "--init-from": [config.model.init_from],
        "--tokenizer-model": [data.tokenizer_model],
        "--reference-load": [config.reference_path],
        "--reference-base": [config.reference_base_path],
        "--reference-scores": selection.reference_scores,
        "--data-path": data.data_path or data.train_data_path,
        "--data-args-path": [data.data_args_path or data.per_split_data_args_path],
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
        "--load": [config.checkpoint.load],
    }
    paths = {flag: [path for path in given if path is not None] for flag, given in named.items()}
    return {flag: " ".join(given) for flag, given in paths.items() if given}
