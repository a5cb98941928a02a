"""The command `pretrain_slm.py`: flags in, exit code out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_slm.config.load import parse
from megatron_slm.config.sections import RunConfig
from megatron_slm.device import backends_found
from megatron_slm.errors import SlmError
from megatron_slm.log import setup_logging
from megatron_slm.loss.objective import Observer
from megatron_slm.parallel.collectives import peers_named, together
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.reach import silent_nodes_named
from megatron_slm.training.build import Run, build_run
from megatron_slm.training.corpora import describe_sources
from megatron_slm.training.dry_run import print_dry_run
from megatron_slm.training.loop import train
from megatron_slm.training.plan import make_plan
from megatron_slm.training.preflight.command import preflight
from megatron_slm.training.resume import open_resume

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 after an error that the user can mend (one line says it, on every rank)."""
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        config, dry_run = parse(sys.argv[1:] if argv is None else argv)
        if dry_run:
            parallel = config.parallel
            least = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
            resume = open_resume(config)
            plan = make_plan(config, int(os.environ.get("WORLD_SIZE", least)), rank=rank, resume=resume)
            if rank == 0:
                print_dry_run(plan)
        else:
            pretrain(config)
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def pretrain(config: RunConfig, *, observer: Observer | None = None) -> Run:
    """Train as configured, in the world the launcher made.

    Raises:
        SlmError: on every rank alike, before the first step if it can be known by then.
    """
    if config.preflight.preflight:
        preflight(config, to_stderr=True)
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    with silent_nodes_named(), peers_named("outside of the pipeline's schedule"):
        resume = open_resume(config)
        with together():
            plan = make_plan(config, dist.get_world_size(), rank=dist.get_rank(), resume=resume)
        logger.info("backends: %s", ", ".join(f"{name} {found}" for name, found in backends_found().items()))
        logger.info("loss head: %s", plan.describe_loss_head())
        for line in describe_sources(plan.train_samples):
            logger.info("%s", line)
        run = build_run(plan, observer=observer)
        train(run)
        dist.barrier()  # nobody leaves while another still writes
    return run
