"""The run's corpora: opened, checked against its vocabulary, and put into the order they are read in."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.config import RunConfig
from megatron_slm.data.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples, SequentialSamples, split_bounds
from megatron_slm.data.sidecar import read_sidecar
from megatron_slm.data.tokenizers import Tokenizer
from megatron_slm.errors import CheckpointError, ConfigError, VocabularyError

logger = logging.getLogger(__name__)


def open_data(
    config: RunConfig, tokenizer: Tokenizer, num_tokens: int, num_samples: int
) -> tuple[PackedSamples, dict[str, SequentialSamples]]:
    """The training samples, `num_samples` of them at least, and the held-out sets by name.

    Raises:
        SlmError: a corpus cannot be used, or two held-out sets have one name.
    """
    data = config.data
    if not data.data_path:
        raise ConfigError(
            "--data-path", data.data_path, "names a corpus", "give the PREFIX of PREFIX.bin and PREFIX.idx"
        )
    corpus = open_corpus(data.data_path[0], tokenizer, num_tokens)
    bounds = split_bounds(data.split, corpus.num_sequences)
    train = PackedSamples(
        corpus, *bounds[0], sequence_length=data.seq_length, num_samples=num_samples, seed=config.training.seed
    )
    held_out = {}
    if bounds[1][0] < bounds[1][1]:
        held_out["valid"] = SequentialSamples(corpus, *bounds[1], sequence_length=data.seq_length)
    for entry in data.valid_data_path:
        name, given, prefix = entry.partition("=")
        if not given:
            name, prefix = Path(entry).name, entry
        if name in held_out:
            raise ConfigError(
                "--valid-data-path", entry, f"has a name of its own ({name} is taken)", "write NAME=PREFIX"
            )
        other = open_corpus(prefix, tokenizer, num_tokens)
        held_out[name] = SequentialSamples(other, 0, other.num_sequences, sequence_length=data.seq_length)
    return train, held_out


def open_corpus(prefix: str, tokenizer: Tokenizer, num_tokens: int) -> IndexedCorpus:
    """Open a corpus and check that its token ids mean what the run's tokenizer says.

    Raises:
        CorpusError, VocabularyError: it is damaged, empty, of another tokenizer, or holds ids beyond the vocabulary.
    """
    corpus = IndexedCorpus(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        logger.warning("%s has no .meta.json, so its tokenizer cannot be checked; its token ids are", prefix)
    elif sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"is the run's tokenizer ({tokenizer.fingerprint()[:12]}), by token table",
            "preprocess the text with the run's tokenizer, or name the corpus' tokenizer",
        )
    if sidecar is not None and sidecar.max_token_id >= num_tokens:
        raise VocabularyError(
            f"largest token id of corpus {prefix}",
            sidecar.max_token_id,
            f"is below the models' {num_tokens} tokens",
            "use models of the corpus' vocabulary",
        )
    corpus.check_vocabulary(num_tokens)
    return corpus


def check_order(config: RunConfig, manifest: Manifest | None, samples: PackedSamples) -> None:
    """Refuse to resume into another order of samples, in which some would repeat and others never come.

    Raises:
        CheckpointError: the orders differ, and --accept-new-sample-order is not given.
    """
    before = manifest.sample_order if manifest else None
    if before in (None, samples.order_fingerprint):
        return
    if not config.checkpoint.accept_new_sample_order:
        raise CheckpointError(
            "--load: order of the samples",
            samples.order_fingerprint[:12],
            f"is that of the checkpoint's run ({str(before)[:12]}): same corpus, --split, --seed, --seq-length, and a "
            "length of run that draws as many epochs",
            "restore these, or accept that samples repeat or are left out with --accept-new-sample-order",
        )
    logger.warning("the order of the samples is not that of the checkpoint's run: samples may repeat or be left out")
