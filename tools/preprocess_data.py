"""Tokenize JSON lines into Megatron's .bin/.idx corpora.

    python tools/preprocess_data.py --input docs.jsonl.zst --output-prefix corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder --append-eod --workers 8
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_slm.data.arguments import ToolParser, exit_code, positive_int
from megatron_slm.data.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_slm.data.tokenizers import TOKENIZER_TYPES
from megatron_slm.log import setup_logging


def build_parser() -> ToolParser:
    """The flags, under Megatron's names."""
    parser = ToolParser("Tokenize JSON lines into Megatron's .bin/.idx corpora.")
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines: files or patterns (.gz, .zst too)")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to tokenize, a corpus each")
    parser.add_argument("--output-prefix", required=True, help="corpora are PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer-type", required=True, help=", ".join(TOKENIZER_TYPES))
    parser.add_argument("--tokenizer-model", help="local folder, tokenizer.json, or SentencePiece .model")
    parser.add_argument("--vocab-size", type=positive_int, help="for NullTokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end documents with the end-of-document token")
    parser.add_argument("--workers", type=positive_int, default=1, help="processes (the result is the same)")
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="at lines not a document")
    parser.add_argument("--log-interval", type=positive_int, default=1000, help="documents between progress lines")
    return parser


def rates(report: PreprocessReport) -> str:
    """Documents and megabytes so far, and per second."""
    seconds = max(report.seconds, 1e-9)
    megabytes = report.num_bytes / 1e6
    return (
        f"{report.num_documents} documents, {megabytes:.1f} MB "
        f"({report.num_documents / seconds:.0f} documents/s, {megabytes / seconds:.2f} MB/s)"
    )


def plain_progress(log_interval: int) -> Callable[[PreprocessReport], None]:
    """Print a line whenever another `log_interval` documents are done."""
    reported = 0

    def on_progress(report: PreprocessReport) -> None:
        nonlocal reported
        if report.num_documents // log_interval > reported:
            reported = report.num_documents // log_interval
            print(f"Processed {rates(report)}", file=sys.stderr, flush=True)

    return on_progress


@contextlib.contextmanager
def progress(log_interval: int) -> Iterator[Callable[[PreprocessReport], None]]:
    """A live line on a terminal (where `rich` is installed), plain lines elsewhere."""
    try:
        from rich.console import Console
    except ImportError:
        yield plain_progress(log_interval)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain_progress(log_interval)
        return
    with console.status("Starting") as status:
        yield lambda report: status.update(f"Processed {rates(report)}")


def summary(config: PreprocessConfig, report: PreprocessReport) -> str:
    """The closing table, a row a corpus, and the lines that were skipped."""
    speed = f"{report.num_bytes / 1e6 / max(report.seconds, 1e-9):.2f}"
    rows: list[tuple[str, ...]] = [("corpus", "documents", "tokens", "empty", "invalid", "longest", "MB/s")]
    for key in config.json_keys:
        counts = (report.num_documents, report.num_tokens[key], report.num_empty[key])
        rest = (report.num_invalid, report.longest_document[key])
        rows.append((Path(config.corpus_prefix(key)).name, *map(str, counts + rest), speed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"skipped {line.path}:{line.line}: {line.reason}" for line in report.invalid]
    if report.num_invalid > len(report.invalid):
        lines.append(f"skipped {report.num_invalid - len(report.invalid)} more")
    return "\n".join(lines)


def run() -> None:
    """Parse, preprocess, and print the table."""
    flags = build_parser().parse_flags()
    config = PreprocessConfig(
        input=tuple(flags.input),
        output_prefix=flags.output_prefix,
        tokenizer_type=flags.tokenizer_type,
        tokenizer_model=flags.tokenizer_model,
        vocab_size=flags.vocab_size,
        json_keys=tuple(flags.json_keys),
        append_eod=flags.append_eod,
        workers=flags.workers,
        on_error=flags.on_error,
        command=shlex.join(sys.argv),
    )
    setup_logging()
    with progress(flags.log_interval) as on_progress:
        report = preprocess(config, on_progress)
    print(summary(config, report))


if __name__ == "__main__":
    sys.exit(exit_code(run))
