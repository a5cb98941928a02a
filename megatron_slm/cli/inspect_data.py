"""`slm-inspect-data`: prints corpora, their documents, and training samples as a run reads them; verifies hashes.

    python tools/inspect_data.py --data-path corpora/web_text_document --verify
    python tools/inspect_data.py --config runs/slm/config.yaml --samples 3 --first-sample 80000
    python tools/inspect_data.py --data-path 0.7 corpora/web 0.3 corpora/books --packing best-fit --samples 3 \\
        --seq-length 2048 --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder

Takes the flags of tools/pretrain_slm.py as well, with the same meaning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_slm.cli.arguments import ToolParser, positive_int
from megatron_slm.cli.command import run_command
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import ConfigError, suggest_name
from megatron_slm.flags.load import parse


def build_parser() -> ToolParser:
    """Build the parser of the tool's own flags."""
    parser = ToolParser(str(__doc__).partition(": ")[2])
    parser.add_argument(
        "--verify", action="store_true", help="read the corpora whole and compare them with their recorded hashes"
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[], help="numbers of documents to print")
    parser.add_argument("--samples", type=positive_int, default=0, help="number of training samples to print")
    parser.add_argument("--first-sample", type=int, default=0, help="number of the first one, in the order of the run")
    parser.add_argument(
        "--num-samples", type=positive_int, help="samples in the run (default: --train-iters x --global-batch-size)"
    )
    return parser


def parse_flags(words: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Parse the tool's flags and the run's.

    Raises:
        ConfigError: a flag is unknown (the nearest known one is named), or has a bad value.
    """
    parser = build_parser()
    flags, rest = parser.parse_known_args(words)
    try:
        return flags, parse(rest, train_iters=max(1, flags.first_sample + flags.samples))[0]
    except ConfigError as error:
        if error.field != "flag":
            raise
        fix = suggest_name(str(error.value), parser._option_string_actions, error.fix, cutoff=0.8)
        raise ConfigError(error.field, error.value, error.rule, fix) from error


def run(words: Sequence[str]) -> None:
    """Parse the command line and print what it asks for."""
    flags, config = parse_flags(words)
    from megatron_slm.run.inspection import print_corpora, print_samples

    print_corpora(config, documents=flags.documents, verify=flags.verify)
    if flags.samples:
        print_samples(config, first=flags.first_sample, count=flags.samples, num_samples=flags.num_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix, 130 after Ctrl-C."""
    return run_command(run, argv)
