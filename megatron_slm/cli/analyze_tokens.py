"""`slm-analyze`: shows which tokens are kept, and how tokens are learned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.analysis.dynamics import THRESHOLD_NATS
from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.errors import AnalysisError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    _check(args)
    choose_accelerator()
    from megatron_slm.analysis.token_reports import dynamics_report, selection_report

    {"selection": selection_report, "dynamics": dynamics_report}[args.command](args)


def _parser() -> ToolParser:
    parser = ToolParser("Show which tokens are kept, and how their losses change over a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    selection = commands.add_parser("selection", help="show the tokens that a model and a reference keep")
    _add_common(selection, max_tokens=50_000)
    selection.add_argument("--reference-load", nargs="+", default=[], metavar="MODEL", help="one reference, or several")
    selection.add_argument(
        "--slm-score",
        default="excess",
        metavar="SCORE",
        help="score that ranks tokens, see docs/selection.md (default: excess)",
    )
    selection.add_argument(
        "--slm-keep-ratio", type=float, default=0.6, help="share of tokens kept, in (0, 1] (default: %(default)s)"
    )
    selection.add_argument("--slm-scope", choices=["sequence", "micro-batch"], default="micro-batch")
    selection.add_argument("--micro-batch-size", type=int, default=0, help="sequences ranked together (default: all)")
    selection.add_argument("--seed", type=int, default=1234, help="seed of --slm-score random (default: %(default)s)")
    dynamics = commands.add_parser("dynamics", help="show how each token's loss changes over a run's checkpoints")
    _add_common(dynamics, max_tokens=320_000)
    dynamics.add_argument("--scores", nargs="+", default=[], metavar="STORE", help="stores of the checkpoints' losses, "
                          "oldest first, written by tools/score_corpus.py; instead of --load")  # fmt: skip
    dynamics.add_argument("--probe", metavar="RUN", help="a run's folder with records of --probe-file; instead of "
                          "--load, and of a sample")  # fmt: skip
    dynamics.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD_NATS,
        help="smallest change of a loss that counts as one, in nats (default: %(default)s)",
    )
    dynamics.add_argument("--most", type=int, default=25, help="fluctuating tokens to list (default: %(default)s)")
    return parser


def _add_common(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    parser.add_argument("--load", nargs="+", default=[], metavar="MODEL", help="Hugging Face folders, checkpoints, or "
                        "runs (all their checkpoints), oldest first")  # fmt: skip
    parser.add_argument("--text-file", nargs="+", default=[], help="JSON lines (.gz, .zst) or .txt")
    parser.add_argument("--data-path", help="prefix of a Megatron corpus, instead of --text-file")
    parser.add_argument("--tokenizer-model", help="tokenizer folder (default: the model's)")
    parser.add_argument(
        "--seq-length", type=int, help="tokens of a sequence (default: the model's context, at most 2048)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        help=f"largest number of tokens to analyze (default: {max_tokens:,})",
    )
    parser.add_argument("--documents", type=int, default=20, help="sequences shown in the page (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, required=True, help="page to write (.html); a .json is written beside it"
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AnalysisError(f"--{name.replace('_', '-')}", value, "be at least 1", "raise it")
    ratio = getattr(args, "slm_keep_ratio", 1.0)
    if not 0.0 < ratio <= 1.0:
        raise AnalysisError("--slm-keep-ratio", ratio, "be in (0, 1]", "use e.g. 0.6")
    probe, stores = getattr(args, "probe", None), getattr(args, "scores", [])
    if sum(map(bool, (args.load, stores, probe))) != 1:
        raise AnalysisError(
            "--load",
            args.load,
            "be the only source of losses, of --load, --scores and --probe",
            "name a run's folder with --load alone",
        )
    if probe and (args.text_file or args.data_path):
        raise AnalysisError(
            "--probe",
            probe,
            "be used without --text-file and --data-path: the record holds its texts",
            "leave them out",
        )
    if not probe and bool(args.text_file) == bool(args.data_path):
        raise AnalysisError(
            "--text-file", args.text_file, "be set, or --data-path, but not both", "name texts or a corpus"
        )
    if args.output.suffix != ".html":
        raise AnalysisError("--output", str(args.output), "end in .html", "add the suffix")
