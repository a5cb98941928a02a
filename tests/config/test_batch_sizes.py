"""Batch sizes by the samples drawn so far, against a walk through the steps one by one."""

from __future__ import annotations

import random
import re

import pytest

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse


def test_megatrons_syntax() -> None:
    sizes = BatchSizes.parse("0:768 250B:1536 1.5T:3072", sequence_length=4096)
    assert sizes == BatchSizes((768, 1536, 3072), (0, 250 * 10**9 // 4096, 1500 * 10**9 // 4096))
    assert BatchSizes.parse("0:8 1K:4", sequence_length=10).first_samples == (0, 100)
    assert (sizes.largest, sizes.at(0), sizes.at(61035155), sizes.at(61035156)) == (3072, 768, 768, 1536)


def test_a_walk_step_by_step() -> None:
    draw = random.Random(1)
    for _ in range(200):
        firsts = sorted(draw.sample(range(1, 60), draw.randint(0, 3)))
        sizes = BatchSizes(tuple(draw.randint(1, 9) for _ in range(len(firsts) + 1)), (0, *firsts))
        ends = [0]
        for step in range(40):
            size = next(
                n for n, first in zip(sizes.sizes[::-1], sizes.first_samples[::-1], strict=True) if first <= ends[-1]
            )
            assert sizes.at(ends[-1]) == size
            for place in range(size):
                assert sizes.step_of(ends[-1] + place) == (step, place)
            ends.append(ends[-1] + size)
        for begin in range(0, 40, 7):
            assert [sizes.samples_of(count, ends[begin]) for count in range(40 - begin)] == [
                end - ends[begin] for end in ends[begin:40]
            ]


@pytest.mark.parametrize(
    "text",
    ["", "8", "0:0", "5:8", "0:8 5:4 5:2", "0:8 1X:4", "0:8, 100:4", "0:8 3:4"],
)
def test_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"--step-batch-size-schedule is {text!r}: must list TOKENS:SAMPLES")
    ):
        BatchSizes.parse(text, sequence_length=4)


def test_one_of_both() -> None:
    words = ["--train-iters", "3", "--step-batch-size-schedule", "0:8"]
    assert parse(words)[0].batch_sizes(default=1) == BatchSizes.constant(8)
    with pytest.raises(ConfigError, match="--global-batch-size is 8: must not be used with --step-batch-size-schedule"):
        parse([*words, "--global-batch-size", "8"])
