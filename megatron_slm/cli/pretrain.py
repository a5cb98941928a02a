"""The command `pretrain_slm.py`: flags in, exit code out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_slm.cli.preflight import preflight
from megatron_slm.config.load import DryRun, parse
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import SlmError
from megatron_slm.log import setup_logging
from megatron_slm.loss.objective import Observer
from megatron_slm.operations.reach import silent_nodes_named
from megatron_slm.parallel.collectives import raise_on_all_ranks, translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.launched import planned_world_size
from megatron_slm.run.backends import check_same_on_all_ranks
from megatron_slm.run.dry_run import print_dry_run
from megatron_slm.run.outline import print_outline
from megatron_slm.run.plan import make_plan
from megatron_slm.run.resume import open_resume
from megatron_slm.run.sample_order import describe_sources
from megatron_slm.training.build import Run, build_run
from megatron_slm.training.loop import train

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code (docs/operations.md). After an error one line says what it is, on every rank."""
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    run: Run | None = None
    first_step = 0
    try:
        config, dry_run = parse(sys.argv[1:] if argv is None else argv)
        if dry_run:
            parallel = config.parallel
            least = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
            world_size = planned_world_size(least)
            if dry_run is DryRun.WITHOUT_FILES:
                print_outline(config, world_size)
                return 0
            plan = make_plan(config, world_size, rank=rank, resume=open_resume(config), dry=True)
            if rank == 0:
                print_dry_run(plan)
        else:
            run = prepare(config)
            first_step = run.position.step
            train_to_the_end(run)
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        has_stepped = run is not None and run.position.step > first_step
        return error.exit_code if has_stepped else error.exit_code_at_start
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def pretrain(config: RunConfig, *, observer: Observer | None = None) -> Run:
    """Train as configured, in the world the launcher made.

    Raises:
        SlmError: on every rank alike, before the first step if it can be known by then.
    """
    run = prepare(config, observer=observer)
    train_to_the_end(run)
    return run


def prepare(config: RunConfig, *, observer: Observer | None = None) -> Run:
    """Join the world, check everything, and build what a run needs. Collective over the world."""
    if config.preflight.preflight:
        preflight(config, to_stderr=True)
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    with silent_nodes_named(), translate_peer_errors("outside of the pipeline's schedule"):
        resume = open_resume(config)
        with raise_on_all_ranks():
            plan = make_plan(config, dist.get_world_size(), rank=dist.get_rank(), resume=resume)
        check_same_on_all_ranks(plan.backends, plan.loss_head_kernels)
        logger.info("computing with: %s", "; ".join(f"{what}: {by}" for what, by in plan.describe_backends().items()))
        for line in describe_sources(plan.train_samples):
            logger.info("%s", line)
        return build_run(plan, observer=observer)


def train_to_the_end(run: Run) -> None:
    """Train, and leave together with all ranks."""
    with silent_nodes_named(), translate_peer_errors("at the start of training"):
        train(run)
