"""Builds a run's fill-in-the-middle."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_slm.config.run import RunConfig
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
    end = settings.fim_eod_token
    eod = eod_id(config, tokenizer) if end is None else require_token(tokenizer, end, "--fim-eod-token")
    return FillInMiddle(settings, tokenizer, eod_id=eod, seed=config.training.seed)


def check_unmasked(opened: Mapping[str, OpenedCorpus]) -> None:
    """Check that no corpus of a run with fill-in-the-middle has a loss mask."""
    for prefix, corpus in opened.items():
        if corpus.loss_mask is not None:
            rule = f"not be used with the loss mask of {prefix}, which belongs to tokens that it moves"
            raise ConfigError("--fim-data", True, rule, "remove it, or use a corpus without a loss mask")
