"""Runs a training from its configuration."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist

from megatron_slm.backends.choice import check_same_on_all_ranks
from megatron_slm.config.run import RunConfig
from megatron_slm.loss.objective import Observer
from megatron_slm.operations.reach import name_silent_nodes
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.parallel.reporting import report_together
from megatron_slm.preflight.run import preflight
from megatron_slm.run.plan import make_plan
from megatron_slm.run.resume import open_resume
from megatron_slm.run.sample_order import describe_sources
from megatron_slm.training.build import Run, build_run
from megatron_slm.training.loop import train

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, *, observer: Observer | None = None) -> Run:
    """Train as configured. Collective over the world.

    Raises:
        SlmError: on every rank, before the first step if it can be known by then.
    """
    run = prepare(config, observer=observer)
    train_prepared(run)
    return run


def prepare(config: RunConfig, *, observer: Observer | None = None) -> Run:
    """Join the process group, validate the configuration, and build the run. Collective over the world."""
    if config.preflight.preflight:
        preflight(config, to_stderr=True)
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    report_together(config.logging.run_dir)
    with name_silent_nodes(), translate_peer_errors("outside of the pipeline's schedule"):
        resume = open_resume(config)
        with raise_on_all_ranks():
            plan = make_plan(config, dist.get_world_size(), rank=dist.get_rank(), resume=resume)
            order = describe_sources(plan.data.train)  # computes the order of a blend
        check_same_on_all_ranks(plan.backends, plan.loss_head_kernels)
        logger.info(
            "computing with: %s", "; ".join(f"{part}: {backend}" for part, backend in plan.describe_backends().items())
        )
        for line in order:
            logger.info("%s", line)
        return build_run(plan, observer=observer)


def train_prepared(run: Run) -> None:
    """Train a prepared run to its end. Collective over the world."""
    with name_silent_nodes(), translate_peer_errors("at the start of training"):
        train(run)
