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
    selection = commands.add_parser("selection", help="which tokens a model and a reference keep")
    _add_common(selection, max_tokens=50_000)
    selection.add_argument("--reference-load", nargs="+", default=[], metavar="MODEL", help="one reference, or several")
    selection.add_argument(
        "--slm-score",
        default="excess",
        metavar="SCORE",
        help="score that ranks tokens, see docs/selection.md (default: excess)",
    )
    selection.add_argument("--slm-keep-ratio", type=float, default=0.6, help="share that is kept, in (0, 1]")
    selection.add_argument("--slm-scope", choices=["sequence", "micro-batch"], default="micro-batch")
    selection.add_argument("--micro-batch-size", type=int, default=0, help="windows ranked together (default: all)")
    selection.add_argument("--seed", type=int, default=1234, help="of --slm-score random")
    dynamics = commands.add_parser("dynamics", help="how each token's loss changes over a run's checkpoints")
    _add_common(dynamics, max_tokens=320_000)
    dynamics.add_argument("--scores", nargs="+", default=[], metavar="STORE", help="stores of the checkpoints' losses, "
                          "oldest first, written by tools/score_corpus.py; instead of --load")  # fmt: skip
    dynamics.add_argument("--probe", metavar="RUN", help="a run's folder with records of --probe-file; instead of "
                          "--load, and of a sample")  # fmt: skip
    dynamics.add_argument("--threshold", type=float, default=THRESHOLD_NATS, help="rise or fall that counts, in nats")
    dynamics.add_argument("--most", type=int, default=25, help="fluctuating tokens that are listed")
    return parser


def _add_common(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    parser.add_argument("--load", nargs="+", default=[], metavar="MODEL", help="Hugging Face folders, checkpoints, or "
                        "runs (all their checkpoints), oldest first")  # fmt: skip
    parser.add_argument("--text-file", nargs="+", default=[], help="JSON lines (.gz, .zst) or .txt")
    parser.add_argument("--data-path", help="prefix of a Megatron corpus, instead of --text-file")
    parser.add_argument("--tokenizer-model", help="tokenizer folder (default: the model's)")
    parser.add_argument("--seq-length", type=int, help="tokens of a window (default: what the model reads)")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of the sample (default {max_tokens:,})")
    parser.add_argument("--documents", type=int, default=20, help="windows that the page shows")
    parser.add_argument("--output", type=Path, required=True, help="the page, .html; a .json beside it")


def _check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AnalysisError(f"--{name.replace('_', '-')}", value, "is at least 1", "give a larger one")
    ratio = getattr(args, "slm_keep_ratio", 1.0)
    if not 0.0 < ratio <= 1.0:
        raise AnalysisError("--slm-keep-ratio", ratio, "lies in (0, 1]", "use e.g. 0.6")
    probe, stores = getattr(args, "probe", None), getattr(args, "scores", [])
    if sum(map(bool, (args.load, stores, probe))) != 1:
        raise AnalysisError(
            "--load",
            args.load,
            "names models (or --scores stores, or --probe a run with records, one of the three)",
            "name a run's folder",
        )
    if probe and (args.text_file or args.data_path):
        raise AnalysisError("--probe", probe, "comes with its texts", "leave --text-file and --data-path out")
    if not probe and bool(args.text_file) == bool(args.data_path):
        raise AnalysisError("--text-file", args.text_file, "or --data-path is given, and not both", "name a sample")
    if args.output.suffix != ".html":
        raise AnalysisError("--output", str(args.output), "ends in .html", "add it")
