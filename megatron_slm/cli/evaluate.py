"""`slm-evaluate`: measures perplexity and few-shot accuracy of a model; prints tables and writes JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_slm.analysis.evaluation.answers import Rules
from megatron_slm.analysis.evaluation.tasks import FORMS
from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    _check(args)
    choose_accelerator()
    from megatron_slm.analysis.evaluation.run import evaluate, print_results

    print_results(evaluate(args))


def _parser() -> ToolParser:
    parser = ToolParser("Measure perplexity, few-shot accuracy and lm-eval tasks of a model.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a checkpoint or a run's folder")
    parser.add_argument(
        "--output", type=Path, help="JSON with the results; what was written goes to .TASK.jsonl beside"
    )
    sets = parser.add_argument_group("perplexity")
    sets.add_argument(
        "--perplexity", nargs="+", default=[], metavar="NAME=FILE", help="texts (.jsonl, .txt) or corpora"
    )
    sets.add_argument("--seq-length", type=int, help="tokens of a window (default: what the model reads)")
    sets.add_argument("--max-tokens", type=int, default=2_000_000, help="of each set (default 2,000,000)")
    sets.add_argument("--tokenizer-model", help="tokenizer folder (default: the model's)")
    tasks = parser.add_argument_group("questions")
    tasks.add_argument(
        "--task", nargs="+", default=[], metavar="FORM=FILE", help=f"JSON lines; forms: {', '.join(FORMS)}"
    )
    tasks.add_argument("--shots", type=int, help="worked problems before each question (default: 8, or 4 of math)")
    tasks.add_argument("--prompt-file", help="own prompt: shots with two empty lines between, then {question}")
    tasks.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer (default 1024)")
    tasks.add_argument("--batch-size", type=int, default=16, help="questions at a time (default 16)")
    tasks.add_argument("--limit", type=int, help="first questions of each task only")
    tasks.add_argument("--rules", choices=get_args(Rules), default="strict", help="what counts as the same number")
    tasks.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of EleutherAI's harness")
    harness.add_argument("--lm-eval-include", metavar="FOLDER", help="folder with task files (YAML) of your own")
    harness.add_argument("--lm-eval-shots", type=int, help="few-shot examples (default: the task's)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("seq_length", "max_tokens", "max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "is at least 1", "give a larger one")
    if args.shots is not None and args.shots < 0:
        raise ConfigError("--shots", args.shots, "is 0 or more", "give 0 for none")
    if not (args.perplexity or args.task or args.lm_eval):
        raise ConfigError("evaluate.py", None, "is given --perplexity, --task or --lm-eval", "say what to evaluate")
    if args.output is not None and args.output.suffix != ".json":
        raise ConfigError("--output", str(args.output), "ends in .json", "add it")
