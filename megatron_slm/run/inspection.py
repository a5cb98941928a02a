"""Prints the corpora of a run, their documents, and the samples that the run makes of them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.config.run import RunConfig
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import document_spans, loss_mask_of, render, summary
from megatron_slm.data.corpus.sidecar import read_sidecar, verify_hashes
from megatron_slm.data.corpus.staging import staged
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.run.corpora import cache_folder
from megatron_slm.run.data_paths import named_corpora
from megatron_slm.run.samples import RunSamples
from megatron_slm.run.tokenizer import open_run_tokenizer


def print_corpora(config: RunConfig, *, documents: Sequence[int] = (), verify: bool = False) -> None:
    """Print a summary of each corpus, and documents of a single one.

    Args:
        documents: numbers of documents to print.
        verify: read each corpus whole and compare it with its recorded hashes.

    Raises:
        SlmError: a corpus is damaged, or documents of several corpora were asked for.
    """
    prefixes = [staged(corpus.prefix, cache_folder(config)) for corpus in named_corpora(config.data)]
    if documents and len(prefixes) != 1:
        rule = f"be used with a single corpus (there are {len(prefixes)})"
        raise ConfigError("--documents", documents, rule, "name one corpus with --data-path")
    for number, prefix in enumerate(prefixes):
        corpus = IndexedCorpus(prefix)
        mask = loss_mask_of(corpus)
        if number:
            print()
        print(summary(corpus, mask))
        if verify:
            print(f"verified: {', '.join(path.name for path in verify_hashes(prefix))} match their recorded hashes")
        for document in documents:
            text = render(document_spans(corpus, mask, document), _corpus_tokenizer(config, prefix))
            print(f"\n━━ document {document}\n{text}")


def print_samples(config: RunConfig, *, first: int, count: int, num_samples: int | None) -> None:
    """Print training samples in the order of the run.

    Args:
        num_samples: of the run; by default --train-iters x --global-batch-size.
    """
    samples = RunSamples.open(config, open_run_tokenizer(config), num_samples)
    print(f"\n{samples.describe()}")
    for text in samples.show(first, count):
        print(f"\n{text}")


def _corpus_tokenizer(config: RunConfig, prefix: str) -> Tokenizer:
    """Open the run's tokenizer and check that the corpus was made with it.

    Raises:
        ConfigError: no tokenizer was named.
        VocabularyError: the corpus was made with another one.
    """
    tokenizer = open_run_tokenizer(config)
    sidecar = read_sidecar(prefix)
    if sidecar is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"match the named tokenizer ({tokenizer.fingerprint()[:12]}), by token table",
            "name the tokenizer that the corpus was made with",
        )
    return tokenizer
