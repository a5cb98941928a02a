"""`slm-preprocess`: tokenizes text into Megatron's .bin/.idx corpora.

Reads JSON lines (plain, .gz, .zst, or - for standard input) and Parquet:

    python tools/preprocess_data.py --input docs.jsonl.zst --output-prefix corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder --append-eod --workers 8

Repeat the command to resume a killed run.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_slm.cli.arguments import ToolParser, positive_int
from megatron_slm.cli.command import run_command
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_slm.data.tokenizers.registry import TOKENIZER_TYPES, build_tokenizer
from megatron_slm.data.tokenizers.tiktoken import NUM_SPECIAL_TOKENS, PATTERNS
from megatron_slm.progress import show_progress, time_left

_LOG_SECONDS = 10.0


def build_parser() -> ToolParser:
    """Build the parser; flags have Megatron's names."""
    parser = ToolParser("Tokenize JSON lines or Parquet into Megatron's .bin/.idx corpora.")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input", nargs="+", required=True, help="files or patterns (.gz, .zst, .parquet too); - is stdin"
    )
    text.add_argument("--json-keys", nargs="+", default=["text"], help="keys (or columns) to tokenize, a corpus each")
    text.add_argument("--loss-mask-key", help="key of a list of 0 and 1, for the list of texts under the JSON key")
    text.add_argument(
        "--score-key",
        nargs="+",
        default=[],
        help="keys of numbers for the tokens of the text, a column PREFIX_KEY_document_NAME each: [number, ...] by "
        "token, or [[start, end, number], ...] by characters",
    )
    text.add_argument(
        "--score-default", type=float, default=0.0, help="number of characters without a span (default: %(default)s)"
    )
    text.add_argument("--prompt-key", help="key of a text that is not trained on; the corpus is PREFIX_sft_document")
    text.add_argument("--response-key", help="key of the text that follows the prompt and is trained on")
    text.add_argument(
        "--special-tokens-in-text",
        choices=["parse", "plain", "error"],
        default="plain",
        help="special tokens that a text spells out, such as </s>: become the token, stay plain characters, or make "
        "the line invalid (default: %(default)s)",
    )
    text.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="on lines that hold no document (default: %(default)s)",
    )
    output = parser.add_argument_group("corpora")
    output.add_argument("--output-prefix", required=True, help="corpora are PREFIX_KEY_document.bin and .idx")
    output.add_argument("--append-eod", action="store_true", help="end documents with the end-of-document token")
    output.add_argument("--eod-token", help="the end-of-document token, as text (default: the tokenizer's eos_token)")
    output.add_argument("--prepend-bos", action="store_true", help="begin documents with the beginning-of-text token")
    add_tokenizer_flags(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=positive_int, default=1, help="processes (the result is the same)")
    work.add_argument(
        "--fast-tokenizer", action="store_true", help="encode with gigatoken, compared with the tokenizer on samples"
    )
    work.add_argument("--log-interval", type=positive_int, help="documents between progress lines (default: 10 s)")
    return parser


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Megatron's tokenizer flags."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, help=", ".join(TOKENIZER_TYPES))
    group.add_argument("--tokenizer-model", help="folder, tokenizer.json, name of the hub, .model or tiktoken file")
    group.add_argument("--vocab-size", type=positive_int, help="for NullTokenizer and TikTokenizer")
    group.add_argument("--vocab-file", help="for GPT2BPETokenizer: vocab.json")
    group.add_argument("--merge-file", help="for GPT2BPETokenizer: merges.txt")
    group.add_argument("--tiktoken-pattern", default="v2", help=f"{', '.join(PATTERNS)}, or a regular expression")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=NUM_SPECIAL_TOKENS, help="of a .json file")
    group.add_argument("--tiktoken-special-tokens", nargs="+", help="their texts, TEXT=ID where an id is not the next")


def rates(report: PreprocessReport) -> str:
    """Format documents and megabytes so far, their rate, and the time left."""
    megabytes, rate = report.num_bytes / 1e6, report.bytes_per_second
    text = f"{report.num_documents} documents, {megabytes:.1f} MB, {rate / 1e6:.2f} MB/s"
    fresh = report.num_bytes - report.num_resumed_bytes
    if report.total_input_bytes and fresh:
        done = report.input_bytes / report.total_input_bytes
        left = report.num_bytes * (1 / max(done, 1e-9) - 1) / max(rate, 1e-9)
        text += f", {100 * done:.0f} %, {time_left(left)} left"
    return text


def plain_progress(log_interval: int | None) -> Callable[[PreprocessReport], None]:
    """Print a line whenever another `log_interval` documents are done, or without it every 10 seconds."""
    reported = 0.0

    def on_progress(report: PreprocessReport) -> None:
        nonlocal reported
        now = report.seconds // _LOG_SECONDS if log_interval is None else report.num_documents // log_interval
        if now > reported:
            reported = now
            print(f"Processed {rates(report)}", file=sys.stderr, flush=True)

    return on_progress


@contextlib.contextmanager
def progress(log_interval: int | None) -> Iterator[Callable[[PreprocessReport], None]]:
    """Show a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield plain_progress(log_interval)
        return
    with show_progress("Processed", unit="B") as bar:
        yield lambda report: bar.update(report.input_bytes, report.total_input_bytes, text=rates(report))


def summary(config: PreprocessConfig, report: PreprocessReport) -> str:
    """Format the closing table, a row a corpus, and the skipped lines."""
    header = ["corpus", "documents", "tokens", "empty", "invalid", "longest", "MB/s"]
    rows = [[*header, "trained on"] if config.keys.is_masked else header]
    for key, counts in report.corpora.items():
        numbers = (report.num_documents, counts.num_tokens, counts.num_empty, report.num_invalid)
        cells = [*map(str, numbers), str(counts.longest_document), f"{report.bytes_per_second / 1e6:.2f}"]
        if config.keys.is_masked:
            cells.append(f"{counts.num_trained} tokens")
        rows.append([Path(config.corpus_prefix(key)).name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    if report.eod is not None:
        lines.append(f"documents end with the token {report.eod}")
    for key, counts in report.corpora.items():
        if counts.num_special:
            how = "became tokens" if config.special_tokens_in_text == "parse" else "stayed plain characters"
            lines.append(f"{counts.num_special} special tokens spelled out under {key!r} {how}")
    if report.num_resumed_bytes:
        lines.append(
            f"{report.num_resumed_bytes / 1e6:.1f} of {report.num_bytes / 1e6:.1f} MB were done by an earlier run"
        )
    lines += [f"skipped {line.source}:{line.line}: {line.reason}" for line in report.invalid]
    if report.num_invalid > len(report.invalid):
        lines.append(f"skipped {report.num_invalid - len(report.invalid)} more")
    return "\n".join(lines)


def run(words: Sequence[str]) -> None:
    """Parse, preprocess, and print the table."""
    flags = build_parser().parse_flags(words)
    keys = DocumentKeys(
        json_keys=tuple(flags.json_keys),
        loss_mask_key=flags.loss_mask_key,
        prompt_key=flags.prompt_key,
        response_key=flags.response_key,
        score_keys=tuple(flags.score_key),
        score_default=flags.score_default,
    )
    config = PreprocessConfig(
        input=tuple(flags.input),
        output_prefix=flags.output_prefix,
        keys=keys,
        append_eod=flags.append_eod,
        prepend_bos=flags.prepend_bos,
        eod_token=flags.eod_token,
        special_tokens_in_text=flags.special_tokens_in_text,
        workers=flags.workers,
        fast_tokenizer=flags.fast_tokenizer,
        on_error=flags.on_error,
        command=shlex.join(sys.argv),
    )
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that workers end and finished parts are kept
    tokenizer = build_tokenizer(
        flags.tokenizer_type,
        flags.tokenizer_model,
        flags.vocab_size,
        vocab_file=flags.vocab_file,
        merge_file=flags.merge_file,
        tiktoken_pattern=flags.tiktoken_pattern,
        tiktoken_num_special_tokens=flags.tiktoken_num_special_tokens,
        tiktoken_special_tokens=flags.tiktoken_special_tokens,
    )
    with progress(flags.log_interval) as on_progress:
        report = preprocess(config, tokenizer, on_progress)
    print(summary(config, report))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix, 130 after Ctrl-C."""
    return run_command(run, argv)
