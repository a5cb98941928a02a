"""`slm-evaluate`: measures perplexity and few-shot accuracy of a model; prints tables and writes JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.errors import ConfigError
from megatron_slm.evaluation.answers import Rules
from megatron_slm.evaluation.tasks import FORMS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    _check(args)
    choose_accelerator()
    from megatron_slm.evaluation.run import evaluate, print_results

    print_results(evaluate(args))


def _parser() -> ToolParser:
    parser = ToolParser("Measure perplexity, few-shot accuracy and lm-eval tasks of a model.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder or hub name, a checkpoint, or a run")
    parser.add_argument("--output", type=Path, help="JSON file of results; answers go to .TASK.jsonl files beside it")
    sets = parser.add_argument_group("perplexity")
    sets.add_argument(
        "--perplexity", nargs="+", default=[], metavar="NAME=FILE", help="texts (.jsonl, .txt) or corpora"
    )
    sets.add_argument("--seq-length", type=int, help="tokens of a window (default: the model's context)")
    sets.add_argument(
        "--max-tokens", type=int, default=2_000_000, help="largest number of tokens a set (default: 2,000,000)"
    )
    sets.add_argument("--tokenizer-model", help="tokenizer folder (default: the model's)")
    tasks = parser.add_argument_group("questions")
    tasks.add_argument(
        "--task", nargs="+", default=[], metavar="FORM=FILE", help=f"JSON lines; forms: {', '.join(FORMS)}"
    )
    tasks.add_argument("--shots", type=int, help="worked problems before each question (default: 8; 4 for math)")
    tasks.add_argument(
        "--prompt-file", help="prompt of your own: examples separated by two empty lines, then {question}"
    )
    tasks.add_argument(
        "--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: %(default)s)"
    )
    tasks.add_argument("--batch-size", type=int, default=16, help="questions per batch (default: %(default)s)")
    tasks.add_argument("--limit", type=int, help="use only the first questions of each task")
    tasks.add_argument(
        "--rules", choices=get_args(Rules), default="strict", help="how numbers are compared (default: %(default)s)"
    )
    tasks.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="data type of the weights (default: %(default)s)",
    )
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument(
        "--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of EleutherAI's lm-evaluation-harness"
    )
    harness.add_argument("--lm-eval-include", metavar="FOLDER", help="folder of your own task files (YAML)")
    harness.add_argument("--lm-eval-shots", type=int, help="few-shot examples (default: the task's)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("seq_length", "max_tokens", "max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "be at least 1", "raise it")
    if args.shots is not None and args.shots < 0:
        raise ConfigError("--shots", args.shots, "be at least 0", "use 0 for no examples")
    if not (args.perplexity or args.task or args.lm_eval):
        raise ConfigError.missing("--perplexity, --task or --lm-eval", "an evaluation", "name at least one")
    if args.output is not None and args.output.suffix != ".json":
        raise ConfigError("--output", str(args.output), "end in .json", "add the suffix")
