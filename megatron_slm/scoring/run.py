"""Runs the scoring pass from a configuration, in the world the launcher made."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import ScoringOptions
from megatron_slm.operations.reach import name_silent_nodes
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.parallel.reporting import report_together
from megatron_slm.preflight.run import preflight
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.reference.store import begun
from megatron_slm.run.resume import open_resume
from megatron_slm.scoring.plan import ScoringPlan, make_scoring_plan
from megatron_slm.scoring.score import score_corpus

logger = logging.getLogger(__name__)


def score(config: RunConfig, options: ScoringOptions) -> StoreManifest:
    """Score as configured. Collective over the world.

    Raises:
        SlmError: on every rank, before the first forward pass if it can be known by then.
    """
    if config.preflight.preflight:
        preflight(config, to_stderr=True)
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    report_together(config.logging.run_dir)
    with name_silent_nodes(), translate_peer_errors("the scoring pass"):
        resume = open_resume(config)
        with raise_on_all_ranks():
            plan = make_scoring_plan(config, options, dist.get_world_size(), rank=dist.get_rank(), resume=resume)
        manifest = score_corpus(plan)
        logger.info("%s is complete: %s", plan.output, _size(manifest))
        dist.barrier()  # no rank leaves while another still writes
    return manifest


def _size(manifest: StoreManifest) -> str:
    megabytes = sum(entry["size"] for entry in manifest.shards.values()) / 1e6
    return f"{manifest.data.num_samples:,} samples in {manifest.num_shards:,} shards, {megabytes:,.1f} MB"


def print_plan(plan: ScoringPlan) -> None:
    """Print the pass as a table.

    Raises:
        ScoreStoreError: the store's folder cannot be used for it.
    """
    manifest, topology = plan.manifest(), plan.topology
    begun(plan.output, manifest)
    tokens = plan.num_samples * plan.config.data.seq_length
    bytes_per_token = {"float32": 4, "bfloat16": 2, "float16": 2}[manifest.dtype]
    stored: str = manifest.dtype
    if manifest.with_entropy:
        bytes_per_token, stored = 2 * bytes_per_token, f"{manifest.dtype} with entropies"
    if manifest.distribution is not None:
        bytes_per_token += manifest.distribution.bytes_per_token
        stored += f", {manifest.distribution.describe()}"
    rows = {
        "layout": topology.describe(),
        "reference": f"{manifest.reference}, {plan.reference.architecture.num_parameters:,} parameters",
        "computes in, stores": f"{manifest.computed_in}, {stored}",
        "samples": f"{plan.num_samples:,} of {plan.config.data.seq_length:,} tokens, {tokens:,} in all",
        "shards": f"{manifest.num_shards:,} of {manifest.samples_per_shard:,} samples",
        "on the disk": f"{tokens * bytes_per_token / 1e6:,.1f} MB in {plan.output}",
    }
    table = Table(title="Scoring pass", show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console()
    console.print(table)
    console.print("The configuration is sound; nothing was scored.")
