"""Builds a run's fill-in-the-middle."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from megatron_slm.config.run import RunConfig
from megatron_slm.data.corpus.sidecar import read_sidecar_of
from megatron_slm.data.fill_in_middle import FillInMiddle
from megatron_slm.data.tokenizers.registry import Tokenizer, require_token
from megatron_slm.errors import ConfigError
from megatron_slm.run.opened_corpora import OpenedCorpus, eod_id


def fill_in_middle(config: RunConfig, tokenizer: Tokenizer) -> FillInMiddle | None:
    """Build what turns this run's samples into fill-in-the-middle; None without --fim-data.

    Raises:
        ConfigError: the tokenizer does not have one of its tokens.
    """
    settings = config.fill_in_middle
    if not settings.fim_data:
        return None
    return FillInMiddle(settings, tokenizer, eod_id=_end_id(config, tokenizer), seed=config.training.seed)


def _end_id(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    end = config.fill_in_middle.fim_eod_token
    return eod_id(config, tokenizer) if end is None else require_token(tokenizer, end, "--fim-eod-token")


def check_corpora(config: RunConfig, tokenizer: Tokenizer, opened: Mapping[str, OpenedCorpus]) -> None:
    """Check that no corpus of a run with fill-in-the-middle has a loss mask, and that their documents' ends are known.

    Raises:
        ConfigError: one has a mask, or ends its documents with another token, which would be moved with their text.
    """
    end = _end_id(config, tokenizer)
    for prefix, corpus in opened.items():
        sidecar = read_sidecar_of(corpus.tokens)
        its_end = None if sidecar is None else sidecar.eod_id
        if its_end is not None and its_end != end:
            table = tokenizer.token_table()
            token, found = table[its_end], None if end is None else table[end]
            rule = f"be {token!r}, which ends the documents of {prefix}"
            raise ConfigError("--fim-eod-token", found, rule, f"add --fim-eod-token {shlex.quote(token)}")
        if corpus.loss_mask is not None:
            rule = f"not be used with the loss mask of {prefix}, which belongs to tokens that it moves"
            raise ConfigError("--fim-data", True, rule, "remove it, or use a corpus without a loss mask")
