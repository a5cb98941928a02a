"""Flags of a reference that follows the model: what is refused by name."""

from __future__ import annotations

import re

import pytest

from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse

BASE = ["--train-iters", "3"]
INIT = [*BASE, "--init-from", "model", "--reference-load", "init"]
PAIR = [*BASE, "--reference-load", "r", "--reference-base", "base", "--slm-score", "reference-loss"]
EMA = [*INIT, "--reference-update", "ema"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*BASE, "--reference-load", "init"], "--init-from is missing: required by --reference-load init"),
        ([*BASE, "--reference-update", "ema"], "--reference-load is missing: required by --reference-update ema"),
        (
            [*INIT, "--reference-update", "history"],
            "--reference-update-interval is missing: required by --reference-update history",
        ),
        ([*EMA, "--reference-update-interval", "0"], "--reference-update-interval is 0: must be positive"),
        ([*INIT, "--reference-update-interval", "2"], "--reference-update-interval is 2: must be used with"),
        ([*EMA, "--reference-update-decay", "1"], "--reference-update-decay is 1.0: must be in (0, 1)"),
        ([*INIT, "--reference-update-decay", "0.5"], "--reference-update-decay is 0.5: must be used with"),
        ([*EMA, "--reference-scores", "store"], "--reference-scores is ['store']: must not be used with"),
        ([*EMA, "--probe-file", "texts", "--eval-interval", "1"], "--probe-file is 'texts': must not be used with"),
        (
            [*BASE, "--reference-scores", "a", "b", "c", "--reference-scores-combine", "difference"],
            "--reference-scores is ['a', 'b', 'c']: must be two stores",
        ),
        (
            [*BASE, "--reference-scores", "a", "b", "--reference-scores-combine", "difference"],
            "--slm-score is ['excess']: must be reference-loss, or a score without a reference",
        ),
        (
            [*PAIR, "--reference-scores", "s"],
            "--reference-base is 'base': must not be used with --reference-scores",
        ),
        ([*BASE, "--reference-base", "base"], "--reference-load is missing: required by --reference-base"),
        (
            [*BASE, "--reference-load", "r", "--reference-base", "base"],
            "--slm-score is ['excess']: must be reference-loss, or a score without a reference, with --reference-base",
        ),
        ([*PAIR, "--slm-score", "loss"], "--slm-score is ['loss']: must include reference-loss with --reference-base"),
        ([*PAIR, "--reference-base", "r"], "--reference-base is 'r': must be another model than --reference-load"),
        ([*PAIR, "--reference-base", "init"], "--init-from is missing: required by --reference-base init"),
        (
            [*PAIR, "--init-from", "r", "--reference-base", "init"],
            "--reference-base is 'init': must be another model than --reference-load",
        ),
        ([*PAIR, "--loss", "kl"], "--reference-base is 'base': must not be used with --loss kl"),
        ([*PAIR, "--reference-update", "ema"], "--reference-base is 'base': must not be used with --reference-update"),
        (
            [*BASE, "--objective", "clm", "--reference-base", "base"],
            "--reference-base is 'base': must not be used with --objective clm",
        ),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(_last_of_each(argv))


def _last_of_each(argv: list[str]) -> list[str]:
    """Leave the last use of each flag: a flag that is used twice is refused for that."""
    given: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            given[word] = values = [word]
        else:
            values.append(word)
    return [word for values in given.values() for word in values]


def test_accepted() -> None:
    config, _ = parse([*EMA, "--reference-update-decay", "0.9"])
    assert config.reference_path == "model"
    assert config.reference_update.decay == 0.9
    assert [config.reference_update.is_due(step) for step in (1, 2)] == [True, True]
    config, _ = parse([*INIT, "--reference-update", "history", "--reference-update-interval", "2"])
    assert config.reference_update.decay == 0.0
    assert [config.reference_update.is_due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert not parse(INIT)[0].reference_update.is_due(1)
