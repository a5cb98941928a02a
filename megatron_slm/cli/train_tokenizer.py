"""`slm-train-tokenizer`: trains a SentencePiece BPE tokenizer of Llama's kind from JSON lines.

    python tools/train_tokenizer.py --input docs.jsonl --vocab-size 32000 --output tokenizer/

An output that is a folder also gets the Hugging Face form, which `AutoTokenizer.from_pretrained` loads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from megatron_slm.cli.arguments import ToolParser, positive_int
from megatron_slm.cli.command import run_command
from megatron_slm.data.tokenizers.training import texts_of_files, train_sentencepiece, write_tokenizer
from megatron_slm.progress import track

logger = logging.getLogger(__name__)


def build_parser() -> ToolParser:
    """Build the parser."""
    parser = ToolParser("Train a SentencePiece BPE tokenizer of Llama's kind from JSON lines.")
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines: files or patterns (.gz, .zst too)")
    parser.add_argument("--json-key", default="text", help="key that holds the text")
    parser.add_argument(
        "--vocab-size", type=positive_int, required=True, help="number of pieces, with bytes and special tokens"
    )
    parser.add_argument("--output", required=True, help="a folder (name/), or a prefix: PREFIX.model")
    return parser


def _read(inputs: Sequence[str], key: str) -> Iterator[str]:
    yield from track(texts_of_files(inputs, key), "reading", "documents")
    logger.info("training on all documents read; SentencePiece does not show how far it is")


def run(words: Sequence[str]) -> None:
    """Parse, train, write."""
    flags = build_parser().parse_flags(words)
    model = train_sentencepiece(_read(flags.input, flags.json_key), vocab_size=flags.vocab_size)
    print(f"wrote {write_tokenizer(model, flags.output)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix, 130 after Ctrl-C."""
    return run_command(run, argv)
