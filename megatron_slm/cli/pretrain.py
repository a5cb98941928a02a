"""`slm-pretrain`: trains as configured, or with --dry-run checks and prints what a run would be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.config.load import DryRun, parse
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import SlmError
from megatron_slm.log import setup_logging
from megatron_slm.parallel.launched import launched_rank

if TYPE_CHECKING:
    from megatron_slm.training.build import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (docs/operations.md)."""
    run: Run | None = None
    first_step = 0

    def execute(words: Sequence[str]) -> None:
        nonlocal run, first_step
        config, dry_run = parse(words)
        if config.logging.quiet:
            setup_logging(launched_rank(), logging.WARNING)
        choose_accelerator()
        if dry_run:
            _dry_run(config, dry_run)
            return
        from megatron_slm.training.pretrain import prepare, train_prepared

        run = prepare(config)
        first_step = run.state.step
        train_prepared(run)

    def exit_code(error: SlmError) -> int:
        has_stepped = run is not None and run.state.step > first_step
        return error.exit_code if has_stepped else error.exit_code_at_start

    return run_command(execute, argv, exit_code=exit_code)


def _dry_run(config: RunConfig, dry_run: DryRun) -> None:
    from megatron_slm.parallel.launched import planned_world_size
    from megatron_slm.run.dry_run import print_dry_run
    from megatron_slm.run.outline import print_outline
    from megatron_slm.run.plan import make_plan
    from megatron_slm.run.resume import open_resume

    parallel = config.parallel
    world_size = planned_world_size(parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if dry_run is DryRun.WITHOUT_FILES:
        print_outline(config, world_size)
        return
    rank = launched_rank()
    plan = make_plan(config, world_size, rank=rank, resume=open_resume(config), dry=True)
    if rank == 0:
        print_dry_run(plan)
