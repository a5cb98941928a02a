"""Show a corpus: counts, documents, samples as training reads them; check it against its hashes.

    python tools/inspect_data.py --data-path corpora/web_text_document --samples 3 --seq-length 2048 \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder
    python tools/inspect_data.py --data-path corpora/web_text_document --verify
"""

from __future__ import annotations

import argparse
import sys

from megatron_slm.data.arguments import ToolParser, exit_code, positive_int
from megatron_slm.data.indexed import IndexedCorpus
from megatron_slm.data.inspection import document_parts, loss_mask_of, render, sample_parts, summary
from megatron_slm.data.packing import PackedSamples, split_bounds
from megatron_slm.data.sidecar import read_sidecar, verify_hashes
from megatron_slm.data.tokenizers import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from megatron_slm.errors import ConfigError, VocabularyError


def build_parser() -> ToolParser:
    """The flags; those of training mean the same as there."""
    parser = ToolParser("Show a corpus: counts, documents, samples as training reads them; check its hashes.")
    parser.add_argument("--data-path", required=True, help="PREFIX of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--verify", action="store_true", help="read all of it and compare with the recorded hashes")
    parser.add_argument("--documents", type=int, nargs="+", default=[], help="numbers of documents to print")
    parser.add_argument("--samples", type=positive_int, default=0, help="training samples to print")
    parser.add_argument("--first-sample", type=int, default=0, help="the first of them, in training's order")
    parser.add_argument("--seq-length", type=positive_int, default=2048)
    parser.add_argument("--num-samples", type=positive_int, help="samples of the whole run (default: one epoch's)")
    parser.add_argument("--split", default="1,0,0", help="as in training; the first share is shown")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--eod-mask-loss", action="store_true", help="show labels after an end of document as masked")
    parser.add_argument("--tokenizer-type", help=", ".join(TOKENIZER_TYPES))
    parser.add_argument("--tokenizer-model", help="local folder, tokenizer.json, SentencePiece .model, tiktoken file")
    parser.add_argument("--vocab-size", type=positive_int, help="for NullTokenizer and TikTokenizer")
    return parser


def open_tokenizer(flags: argparse.Namespace) -> Tokenizer:
    """The corpus' tokenizer.

    Raises:
        ConfigError: none is named.
        VocabularyError: the corpus was made with another one.
    """
    if flags.tokenizer_type is None:
        raise ConfigError("tokenizer_type", None, "is needed to print text", "give the flags of preprocessing")
    tokenizer = build_tokenizer(flags.tokenizer_type, flags.tokenizer_model, flags.vocab_size)
    sidecar = read_sidecar(flags.data_path)
    if sidecar is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {flags.data_path}",
            sidecar.tokenizer_fingerprint[:12],
            f"must be the tokenizer that is given ({tokenizer.fingerprint()[:12]}), by token table",
            "give the one it was made with",
        )
    return tokenizer


def run() -> None:
    """Parse, then print what is asked for."""
    flags = build_parser().parse_flags()
    corpus = IndexedCorpus(flags.data_path)
    mask = loss_mask_of(corpus)
    print(summary(corpus, mask))
    if flags.verify:
        files = verify_hashes(flags.data_path)
        print(f"verified: {', '.join(path.name for path in files)} are what was written")
    if flags.documents or flags.samples:
        tokenizer = open_tokenizer(flags)
        for document in flags.documents:
            text = render(document_parts(corpus, mask, document), tokenizer)
            print(f"\n━━ document {document}\n{text}")
        if flags.samples:
            print_samples(flags, corpus, mask, tokenizer)


def print_samples(
    flags: argparse.Namespace, corpus: IndexedCorpus, mask: IndexedCorpus | None, tokenizer: Tokenizer
) -> None:
    """Samples in the order of training."""
    samples = PackedSamples(
        corpus,
        *split_bounds(flags.split, corpus.num_sequences)[0],
        sequence_length=flags.seq_length,
        num_samples=flags.num_samples,
        seed=flags.seed,
    )
    last = flags.first_sample + flags.samples - 1
    if not 0 <= flags.first_sample <= last < len(samples):
        raise ConfigError(
            "first_sample, samples", (flags.first_sample, last), f"must lie below {len(samples)}", "ask less"
        )
    for index in range(flags.first_sample, last + 1):
        text = render(sample_parts(samples, mask, index), tokenizer, tokenizer.eod_id, flags.eod_mask_loss)
        print(f"\n━━ sample {index} of {len(samples)}\n{text}")


if __name__ == "__main__":
    sys.exit(exit_code(run))
