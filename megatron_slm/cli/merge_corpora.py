"""`slm-merge-corpora`: concatenates corpora, with their loss masks, columns and sidecars.

    python tools/merge_corpora.py --input corpora/a_text_document corpora/b_text_document --output-prefix corpora/all

A folder means all corpora in it, sorted by name.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command
from megatron_slm.data.corpus.columns import is_column
from megatron_slm.data.corpus.merging import merge_corpora
from megatron_slm.data.corpus.sidecar import LOSS_MASK_SUFFIX
from megatron_slm.errors import CorpusError


def build_parser() -> ToolParser:
    """Build the parser; flags are named as in Megatron's tools/merge_datasets.py."""
    parser = ToolParser("Concatenate corpora into one, with their loss masks, columns and sidecars.")
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders of corpora, in this order")
    parser.add_argument("--output-prefix", required=True, help="prefix of the new corpus")
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="NAME", help="columns (PREFIX_NAME.bin and .idx) to leave out"
    )
    return parser


def prefixes(inputs: Sequence[str]) -> list[str]:
    """List the prefixes of the named corpora; of a folder all but loss masks and columns, sorted.

    Raises:
        CorpusError: a folder holds no corpus.
    """
    found: list[str] = []
    for name in inputs:
        if not Path(name).is_dir():
            found.append(name.removesuffix(".bin").removesuffix(".idx"))
            continue
        inside = [str(path.with_suffix("")) for path in sorted(Path(name).glob("*.idx"))]
        masks = {f"{prefix}{LOSS_MASK_SUFFIX}" for prefix in inside}
        if not inside:
            raise CorpusError("--input", name, "hold a corpus (.bin and .idx)", "check the folder")
        found += [prefix for prefix in inside if prefix not in masks and not is_column(prefix)]
    return found


def run(words: Sequence[str]) -> None:
    """Parse, merge, and print the new corpus' size."""
    flags = build_parser().parse_flags(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that half-written files are removed
    names = prefixes(flags.input)
    warn = logging.getLogger("megatron_slm.merge").warning
    merged = merge_corpora(names, flags.output_prefix, shlex.join(sys.argv), warn, drop=flags.drop)
    print(f"{flags.output_prefix}: {len(names)} corpora, {merged.num_documents} documents, {merged.num_tokens} tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix, 130 after Ctrl-C."""
    return run_command(run, argv)
