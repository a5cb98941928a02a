"""`slm-score`: stores a reference's per-token losses for the samples of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.config.load import DryRun, parse
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import LogprobDtype, ScoreDtype, ScoringOptions
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.launched import launched_rank

_DESCRIPTION = """Write a reference's per-token losses for the samples of a run, for --reference-scores.

Takes the flags of pretrain_slm.py (see its --help) as well, on the command line or in the run's own YAML file;
--reference-load names the reference. Layout and --micro-batch-size may differ from the run's. Run it again with the
same flags, at any layout, to score missing or damaged shards. A run resumed with a larger --train-iters keeps its
sample order: name its checkpoint with --load here too."""


def _parser() -> ToolParser:
    parser = ToolParser(
        _DESCRIPTION,
        prog="score_corpus.py",
        usage="%(prog)s --config FILE --output STORE [flags]",
    )
    parser.add_argument("--output", help="the store's folder (default: the --reference-scores of the configuration)")
    parser.add_argument(
        "--score-dtype",
        choices=get_args(ScoreDtype),
        default="float32",
        help="data type of the stored scores (default: %(default)s)",
    )
    parser.add_argument(
        "--with-entropy", action="store_true", help="also store the entropy of the reference's predictions"
    )
    parser.add_argument(
        "--top-logprobs",
        type=int,
        metavar="K",
        help="also store the K largest log-probabilities and the rest's a token, for --loss kl, reverse-kl and jsd",
    )
    parser.add_argument(
        "--sampled-ids",
        type=int,
        metavar="N",
        help="also store N ids a token drawn from the reference's distribution, an unbiased sample for --loss kl, and "
        "its entropy",
    )
    parser.add_argument(
        "--logprobs-dtype",
        choices=get_args(LogprobDtype),
        default="bfloat16",
        help="data type of the stored log-probabilities (default: %(default)s)",
    )
    parser.add_argument(
        "--retokenize",
        action="store_true",
        help="score with a reference of another tokenizer, the one in its folder, and spread its losses over the run's "
        "tokens by characters",
    )
    parser.add_argument(
        "--reference-seq-length",
        type=int,
        metavar="TOKENS",
        help="length of a sample in that tokenizer's tokens (default: --seq-length)",
    )
    return parser


def parse_scoring(argv: Sequence[str]) -> tuple[RunConfig, ScoringOptions, DryRun]:
    """Parse the run's configuration, the options of the pass, and the kind of dry run.

    Raises:
        ConfigError: a flag is wrong (see `parse`), or no folder to write to was named.
    """
    own, rest = _parser().parse_known_args(argv)
    config, dry_run = parse(rest)
    if dry_run is DryRun.WITHOUT_FILES:
        raise ConfigError("--without-files", True, "be used with tools/pretrain_slm.py only", "leave it out")
    stores = config.selection.reference_scores
    if own.output is None and len(stores) != 1:
        raise ConfigError.missing(
            "--output", "a configuration without a single --reference-scores", "name the store's folder"
        )
    options = ScoringOptions(
        output=own.output or stores[0],
        score_dtype=own.score_dtype,
        with_entropy=own.with_entropy or own.sampled_ids is not None,
        top_logprobs=own.top_logprobs,
        sampled_ids=own.sampled_ids,
        logprobs_dtype=own.logprobs_dtype,
        retokenize=own.retokenize,
        reference_seq_length=own.reference_seq_length,
    )
    return config, options, dry_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    config, options, dry_run = parse_scoring(words)
    choose_accelerator()
    if dry_run:
        _dry_run(config, options)
        return
    from megatron_slm.scoring.run import score

    score(config, options)


def _dry_run(config: RunConfig, options: ScoringOptions) -> None:
    from megatron_slm.parallel.launched import planned_world_size
    from megatron_slm.run.resume import open_resume
    from megatron_slm.scoring.plan import make_scoring_plan
    from megatron_slm.scoring.run import print_plan

    parallel, rank = config.parallel, launched_rank()
    world_size = planned_world_size(parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    plan = make_scoring_plan(config, options, world_size, rank=rank, resume=open_resume(config), dry=True)
    if rank == 0:
        print_plan(plan)
