"""Flags of the scoring pass: what is refused by name."""

from __future__ import annotations

import re

import pytest

from megatron_slm.cli.score import parse_scoring
from megatron_slm.errors import ConfigError

BASE = ["--train-iters", "3", "--reference-load", "somewhere", "--output", "store"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-logprobs", "8", "--sampled-ids", "4"], "--sampled-ids is 4: must not be used with --top-logprobs"),
        (["--top-logprobs", "0"], "--top-logprobs is 0: must be positive"),
        (["--sampled-ids", "-1"], "--sampled-ids is -1: must be positive"),
        (["--retokenize", "--top-logprobs", "8"], "--top-logprobs is 8: must not be used with --retokenize"),
        (["--retokenize", "--sampled-ids", "4"], "--sampled-ids is 4: must not be used with --retokenize"),
        (["--retokenize", "--with-entropy"], "--with-entropy is True: must not be used with --retokenize"),
        (["--reference-seq-length", "32"], "--reference-seq-length is 32: must be used with --retokenize"),
        (["--retokenize", "--reference-seq-length", "0"], "--reference-seq-length is 0: must be positive"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_scoring([*BASE, *argv])


def test_accepted() -> None:
    _, options, _ = parse_scoring([*BASE, "--sampled-ids", "4"])
    assert (options.sampled_ids, options.with_entropy) == (4, True), "the value of a sampled divergence needs entropies"
    _, options, _ = parse_scoring([*BASE, "--retokenize", "--reference-seq-length", "32"])
    assert (options.retokenize, options.reference_seq_length) == (True, 32)
