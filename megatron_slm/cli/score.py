"""The command `score_corpus.py`: flags in, exit code out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import get_args

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.preflight import preflight
from megatron_slm.config.load import DryRun, parse
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, SlmError
from megatron_slm.log import setup_logging
from megatron_slm.operations.reach import silent_nodes_named
from megatron_slm.parallel.collectives import raise_on_all_ranks, translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.launched import planned_world_size
from megatron_slm.reference.manifest import Manifest, ScoreDtype
from megatron_slm.run.resume import open_resume
from megatron_slm.scoring.plan import ScoringOptions, ScoringPlan, make_scoring_plan
from megatron_slm.scoring.score import score_corpus

logger = logging.getLogger(__name__)
_DESCRIPTION = """Write a reference's per-token losses for the samples of a run, for --reference-scores.

Beside the flags below it takes those of pretrain_slm.py (see its --help), on the command line or in the run's own
YAML file; --reference-load names the reference. Layout and --micro-batch-size need not be the run's. Run again with
the same flags, at any layout, it scores what is missing or damaged. A run that is resumed with a larger --train-iters
keeps the order of samples that it has begun: name its checkpoint with --load here too."""


def _parser() -> ToolParser:
    parser = ToolParser(
        _DESCRIPTION,
        prog="score_corpus.py",
        usage="%(prog)s --config FILE --output STORE [flags]",
    )
    parser.add_argument("--output", help="the store's folder (default: the --reference-scores of the configuration)")
    parser.add_argument(
        "--score-dtype", choices=get_args(ScoreDtype), default="float32", help="what scores are stored in"
    )
    parser.add_argument("--with-entropy", action="store_true", help="store the entropy of its predictions too")
    return parser


def parse_scoring(argv: Sequence[str]) -> tuple[RunConfig, ScoringOptions, DryRun]:
    """The run's configuration, the pass's options, and whether only a dry run is asked for.

    Raises:
        ConfigError: see `parse`; or there is no folder to write to.
    """
    own, rest = _parser().parse_known_args(argv)
    config, dry_run = parse(rest)
    if dry_run is DryRun.WITHOUT_FILES:
        raise ConfigError("--without-files", True, "is for tools/pretrain_slm.py", "leave it out")
    stores = config.selection.reference_scores
    if own.output is None and len(stores) != 1:
        raise ConfigError("--output", None, "is given, or the configuration names one --reference-scores", "name it")
    options = ScoringOptions(output=own.output or stores[0], score_dtype=own.score_dtype, with_entropy=own.with_entropy)
    return config, options, dry_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 after an error that the user can mend (one line says it, on every rank)."""
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    try:
        config, options, dry_run = parse_scoring(sys.argv[1:] if argv is None else argv)
        if dry_run:
            parallel = config.parallel
            least = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
            world_size = planned_world_size(least)
            plan = make_scoring_plan(config, options, world_size, rank=rank, resume=open_resume(config), dry=True)
            if rank == 0:
                _print_plan(plan)
        else:
            score(config, options)
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def score(config: RunConfig, options: ScoringOptions) -> Manifest:
    """Score as configured, in the world the launcher made.

    Raises:
        SlmError: on every rank alike, before the first forward pass if it can be known by then.
    """
    if config.preflight.preflight:
        preflight(config, to_stderr=True)
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    with silent_nodes_named(), translate_peer_errors("the scoring pass"):
        resume = open_resume(config)
        with raise_on_all_ranks():
            plan = make_scoring_plan(config, options, dist.get_world_size(), rank=dist.get_rank(), resume=resume)
        manifest = score_corpus(plan)
        logger.info("%s is complete: %s", plan.output, _size(manifest))
        dist.barrier()  # nobody leaves while another still writes
    return manifest


def _size(manifest: Manifest) -> str:
    megabytes = sum(entry["size"] for entry in manifest.shards.values()) / 1e6
    return f"{manifest.data.num_samples:,} samples in {manifest.num_shards:,} shards, {megabytes:,.1f} MB"


def _print_plan(plan: ScoringPlan) -> None:
    manifest, topology = plan.manifest(), plan.topology
    tokens = plan.num_samples * plan.config.data.seq_length
    bytes_per_token = {"float32": 4, "bfloat16": 2, "float16": 2}[manifest.dtype] * (1 + manifest.with_entropy)
    rows = {
        "layout": f"{topology.pipeline} stages x {topology.data} data parallel x {topology.tensor} tensor parallel",
        "reference": f"{manifest.reference}, {plan.reference.architecture.num_parameters:,} parameters",
        "computes in, stores": f"{manifest.computed_in}, {manifest.dtype}{' with entropies' * manifest.with_entropy}",
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
