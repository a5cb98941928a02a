"""Show corpora and the samples that a run makes of them: counts, documents, samples as training reads them; hashes.

    python tools/inspect_data.py --data-path corpora/web_text_document --verify
    python tools/inspect_data.py --config runs/slm/config.yaml --samples 3 --first-sample 80000
    python tools/inspect_data.py --data-path 0.7 corpora/web 0.3 corpora/books --packing best-fit --samples 3 \\
        --seq-length 2048 --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder

Beside the flags below it takes those of tools/pretrain_slm.py, and gives them the same meaning.
"""

from __future__ import annotations

import argparse
import difflib

from megatron_slm.cli.arguments import ToolParser, exit_code, positive_int
from megatron_slm.config import RunConfig
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import document_spans, loss_mask_of, render, summary
from megatron_slm.data.corpus.sidecar import read_sidecar, verify_hashes
from megatron_slm.data.corpus.staging import staged
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.log import setup_logging
from megatron_slm.run.corpora import cache_folder
from megatron_slm.run.data_paths import named_corpora
from megatron_slm.run.samples import RunSamples, parse_run
from megatron_slm.run.tokenizer import open_run_tokenizer


def build_parser() -> ToolParser:
    """The tool's own flags."""
    parser = ToolParser(str(__doc__))
    parser.add_argument("--verify", action="store_true", help="read all of it and compare with the recorded hashes")
    parser.add_argument("--documents", type=int, nargs="+", default=[], help="numbers of documents to print")
    parser.add_argument("--samples", type=positive_int, default=0, help="training samples to print")
    parser.add_argument("--first-sample", type=int, default=0, help="the first of them, in the order of the run")
    parser.add_argument(
        "--num-samples", type=positive_int, help="samples of the run (default: --train-iters x --global-batch-size)"
    )
    return parser


def parse() -> tuple[argparse.Namespace, RunConfig]:
    """The tool's flags and the run's.

    Raises:
        ConfigError: a flag is unknown (the nearest known one is named), or has a bad value.
    """
    parser = build_parser()
    flags, rest = parser.parse_known_args()
    try:
        return flags, parse_run(rest, flags.first_sample + flags.samples)
    except ConfigError as error:
        near = difflib.get_close_matches(f"--{error.value}", list(parser._option_string_actions), n=1, cutoff=0.8)
        fix = f"did you mean {near[0]}?" if near and error.field == "flag" else error.fix
        raise ConfigError(error.field, error.value, error.rule, fix) from error


def open_tokenizer(config: RunConfig, prefix: str) -> Tokenizer:
    """The tokenizer that is named, which must be the corpus'.

    Raises:
        ConfigError: none is named.
        VocabularyError: the corpus was made with another one.
    """
    tokenizer = open_run_tokenizer(config)
    sidecar = read_sidecar(prefix)
    if sidecar is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"must be the tokenizer that is given ({tokenizer.fingerprint()[:12]}), by token table",
            "give the one it was made with",
        )
    return tokenizer


def run() -> None:
    """Parse, then print what is asked for."""
    setup_logging()
    flags, config = parse()
    prefixes = [staged(corpus.prefix, cache_folder(config)) for corpus in named_corpora(config.data)]
    if flags.documents and len(prefixes) != 1:
        raise ConfigError("documents", flags.documents, f"are of one corpus, not of {len(prefixes)}", "name one")
    for number, prefix in enumerate(prefixes):
        corpus = IndexedCorpus(prefix)
        mask = loss_mask_of(corpus)
        print("\n" * (number > 0) + summary(corpus, mask))
        if flags.verify:
            files = verify_hashes(prefix)
            print(f"verified: {', '.join(path.name for path in files)} are what was written")
        for document in flags.documents:
            text = render(document_spans(corpus, mask, document), open_tokenizer(config, prefix))
            print(f"\n━━ document {document}\n{text}")
    if flags.samples:
        samples = RunSamples.open(config, open_run_tokenizer(config), flags.num_samples)
        print(f"\n{samples.describe()}")
        for text in samples.show(flags.first_sample, flags.samples):
            print(f"\n{text}")


def main() -> int:
    """Run the command; the exit code."""
    return exit_code(run)
