"""Opens the corpora of a run, each once, and validates them against its vocabulary."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from megatron_slm.config.run import RunConfig
from megatron_slm.data.corpus.columns import open_column
from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import find_loss_mask, read_sidecar_of
from megatron_slm.data.corpus.staging import staged
from megatron_slm.data.index_cache import Arrays, IndexCache
from megatron_slm.data.samples import OrderedSamples
from megatron_slm.data.samples_with_loss import numbers_with_loss
from megatron_slm.data.tokenizers.registry import Tokenizer, require_token
from megatron_slm.data.trained_tokens import TrainedTokens
from megatron_slm.errors import ConfigError, VocabularyError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedCorpus:
    """A corpus and its loss mask, if any."""

    tokens: IndexedCorpus
    loss_mask: IndexedCorpus | None
    columns: Mapping[str, IndexedCorpus] = field(default_factory=dict)
    """Columns of the corpus that the run reads, by name; only of corpora that are trained on."""

    def with_columns(self, names: Sequence[str]) -> OpenedCorpus:
        """Open columns of the corpus.

        Raises:
            CorpusError: one cannot be used.
        """
        return replace(self, columns={name: open_column(self.tokens, name) for name in names})

    @cached_property
    def mask_fingerprint(self) -> str:
        """Identify the content of the loss mask."""
        assert self.loss_mask is not None
        sidecar = read_sidecar_of(self.tokens)
        recorded = None if sidecar is None else sidecar.loss_mask_bin_sha256
        return recorded or content_sha256(self.loss_mask)

    def numbers_with_loss(self, order: OrderedSamples, cache: IndexCache) -> Arrays:
        """Return the numbers of the samples that have a trained token (see `numbers_with_loss`)."""
        assert self.loss_mask is not None
        return numbers_with_loss(order, partial(TrainedTokens, self.loss_mask), self.mask_fingerprint, cache)


@dataclass(frozen=True, kw_only=True)
class CorpusOpener:
    """Opens each corpus once and validates it against the run's vocabulary."""

    tokenizer: Tokenizer
    num_tokens: int
    eod_id: int | None
    """End-of-document token that samples are cut at; None where it does not matter."""
    cache: Path
    """Folder for copies of remote corpora."""
    share: tuple[int, int] = (0, 1)
    """(i, n) reads the token ids of the i-th of n shares of the corpora, so that n ranks together read each once."""
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Columns that are read, by prefix of the corpus."""
    opened: dict[str, OpenedCorpus] = field(default_factory=dict)

    def open(self, prefix: str) -> OpenedCorpus:
        """Open a corpus, or return the one opened before.

        Raises:
            SlmError: it is damaged, or of another vocabulary.
        """
        if prefix not in self.opened:
            names = self.columns.get(prefix, ())
            local = staged(prefix, self.cache, names)
            tokens, mask = open_corpus(local, self.tokenizer, self.num_tokens), find_loss_mask(local)
            if len(self.opened) % self.share[1] == self.share[0]:
                tokens.check_vocabulary(self.num_tokens)
            self._check_ends(tokens)
            opened = OpenedCorpus(tokens=tokens, loss_mask=None if mask is None else IndexedCorpus(mask))
            self.opened[prefix] = opened.with_columns(names)
        return self.opened[prefix]

    def _check_ends(self, corpus: IndexedCorpus) -> None:
        """Check that the run knows the token that ends the corpus's documents."""
        sidecar = read_sidecar_of(corpus)
        if self.eod_id is None or sidecar is None or sidecar.eod_id in (None, self.eod_id):
            return
        token = self.tokenizer.token_table()[sidecar.eod_id]
        raise ConfigError(
            "--eod-token",
            self.tokenizer.token_table()[self.eod_id],
            f"be {token!r}, which ends the documents of {corpus.prefix}",
            f"add --eod-token {shlex.quote(token)}",
        )


def open_corpus(prefix: str, tokenizer: Tokenizer, num_tokens: int) -> IndexedCorpus:
    """Open a corpus and validate what its .meta.json records against the run's tokenizer and vocabulary.

    Raises:
        CorpusError, VocabularyError: it is damaged, empty, of another tokenizer, or records ids beyond the vocabulary.
    """
    corpus = IndexedCorpus(prefix)
    sidecar = read_sidecar_of(corpus)
    if sidecar is None:
        logger.warning("%s has no .meta.json: its token ids are checked, its tokenizer cannot be", prefix)
    elif sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"have the token table of the run's tokenizer ({tokenizer.fingerprint()[:12]})",
            "preprocess the text with the run's tokenizer, or name the corpus' tokenizer",
        )
    if sidecar is not None and sidecar.max_token_id >= num_tokens:
        raise VocabularyError(
            f"largest token id of corpus {prefix}",
            sidecar.max_token_id,
            f"be below the models' vocabulary size, {num_tokens}",
            "use models of the corpus' vocabulary",
        )
    return corpus


def eod_id(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """Return the id of --eod-token, else the tokenizer's own end-of-document id.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    token = config.data.eod_token
    return tokenizer.eod_id if token is None else require_token(tokenizer, token, "--eod-token")
