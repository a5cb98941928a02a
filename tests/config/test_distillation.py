"""Flags of the distillation: what is refused by name."""

from __future__ import annotations

import re

import pytest

from megatron_slm.config.load import parse
from megatron_slm.errors import ConfigError

BASE = ["--train-iters", "3"]
KL = [*BASE, "--loss", "kl"]
LIVE = ["--reference-load", "somewhere"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (KL, "--reference-load is missing: required by --loss kl."),
        ([*KL, "--slm-score", "loss"], "--reference-load is missing: required by --loss kl."),
        ([*KL, "--objective", "clm"], "--loss is 'kl': must be ce with --objective clm"),
        ([*KL, *LIVE, "--distillation-temperature", "0"], "--distillation-temperature is 0.0: must be positive"),
        ([*KL, *LIVE, "--distillation-temperature", "-1"], "--distillation-temperature is -1.0: must be positive"),
        ([*KL, *LIVE, "--distillation-weight", "1.5"], "--distillation-weight is 1.5: must be in [0, 1]"),
        ([*KL, *LIVE, "--distillation-skew", "0.3"], "--distillation-skew is 0.3: must be used with --loss jsd"),
        ([*BASE, *LIVE, "--loss", "jsd", "--distillation-skew", "1"], "--distillation-skew is 1.0: must be in (0, 1)"),
        ([*BASE, *LIVE, "--distillation-weight", "0.3"], "--distillation-weight is 0.3: must be used with --loss kl"),
        (
            [*KL, *LIVE, "--distillation-temperature", "2", "--loss-head-variant", "stash"],
            "--loss-head-variant is 'stash': must be recompute or auto with --distillation-temperature",
        ),
        (
            [*KL, "--reference-scores", "store", "--distillation-temperature", "2"],
            "--distillation-temperature is 2.0: must be 1 with --reference-scores",
        ),
        (
            [*KL, "--reference-scores", "a", "b", "--reference-scores-combine", "mean"],
            "--reference-scores is ['a', 'b']: must be one store with --loss kl",
        ),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(argv)


def test_accepted() -> None:
    config, _ = parse([*BASE, *LIVE, "--loss", "jsd", "--distillation-temperature", "2"])
    assert (config.distillation.num_passes, config.distillation.tempers) == (3, True)
    assert parse([*KL, *LIVE])[0].distillation.num_passes == 1
