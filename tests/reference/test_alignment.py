"""Losses of one tokenization spread over another: by hand, and sums on a thousand documents in many scripts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.data.tokenizers.hugging_face import HuggingFaceTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.data.tokenizers.training import train_sentencepiece, write_tokenizer
from megatron_slm.reference.alignment import Alignment
from tests.data.byte_level import byte_level_folder
from tests.data.texts import mixtures, training_texts


def spread(source_ends: list[int], target_ends: list[int], losses: list[float]) -> list[float]:
    alignment = Alignment.of(source_ends, target_ends)
    return alignment.spread(np.array(losses, np.float32), slice(0, len(alignment.source_stops))).tolist()


@pytest.mark.parametrize(
    ("source_ends", "target_ends", "losses", "expected"),
    [
        ([2, 5], [2, 5], [1.5, 0.25], [1.5, 0.25]),  # the same tokens
        ([2, 5], [5], [1.5, 0.25], [1.75]),  # added up
        ([4, 6], [1, 4, 6], [8.0, 1.0], [2.0, 6.0, 1.0]),  # divided by characters
        ([3, 6], [2, 6], [3.0, 6.0], [3.0, 6.0]),  # ends meet at 6 only: 9 by 2 and 4 characters
        ([1, 1, 1, 2], [1, 2], [1.0, 2.0, 4.0, 8.0], [1.0, 14.0]),  # bytes of a character: the second group has three
        ([1, 2], [1, 1, 2], [1.0, 4.0], [1.0, 2.0, 2.0]),  # a token without a character of its own counts as one
        ([1, 1], [1], [1.0, 2.0], [3.0]),  # and at the end
        ([1], [1, 1], [3.0], [1.5, 1.5]),
        ([], [], [], []),
    ],
)
def test_by_hand(source_ends: list[int], target_ends: list[int], losses: list[float], expected: list[float]) -> None:
    assert spread(source_ends, target_ends, losses) == expected


def test_a_part_of_the_groups() -> None:
    alignment = Alignment.of([2, 4, 9], [1, 2, 4, 6, 9])
    groups = alignment.groups_of(1, 3)
    assert (alignment.sources_of(groups), alignment.targets_of(groups)) == (slice(0, 2), slice(0, 3))
    assert alignment.spread(np.array([2.0, 5.0], np.float32), groups).tolist() == [1.0, 1.0, 5.0]
    last = alignment.groups_of(4, 5)
    assert (alignment.sources_of(last), alignment.targets_of(last)) == (slice(2, 3), slice(3, 5))
    assert alignment.spread(np.array([5.0], np.float32), last).tolist() == [2.0, 3.0]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp").mkdir()
    write_tokenizer(train_sentencepiece(training_texts(), vocab_size=500), folder / "sp")
    return [
        HuggingFaceTokenizer(byte_level_folder(folder / "bytes")),
        SentencePieceTokenizer(folder / "sp" / "tokenizer.model"),
    ]


@pytest.mark.parametrize("order", [0, 1], ids=["bytes to pieces", "pieces to bytes"])
def test_sums_of_a_thousand_documents_are_preserved(order: int, tokenizers: list[Tokenizer]) -> None:
    source, target = tokenizers if order == 0 else tokenizers[::-1]
    generator, others = np.random.default_rng(1), 0
    for text in mixtures(1000):
        source_ends, target_ends = source.encode_with_ends(text)[1], target.encode_with_ends(text)[1]
        losses = (generator.exponential(3.0, len(source_ends)) * 10.0 ** generator.integers(-4, 1)).astype(np.float32)
        found = np.array(spread(source_ends, target_ends, losses.tolist()), np.float32)
        assert len(found) == len(target_ends)
        assert (found >= 0).all()
        difference = abs(math.fsum(found.tolist()) - math.fsum(losses.tolist()))
        assert difference <= 0.5 * float(np.spacing(found[-1])), text
        others += len(source_ends) != len(target_ends)
    assert others > 900, "the tokenizers differ"


def test_equal_tokenizers_give_equal_bits(tokenizers: list[Tokenizer]) -> None:
    generator = np.random.default_rng(2)
    for tokenizer in tokenizers:
        for text in mixtures(200):
            ends = tokenizer.encode_with_ends(text)[1]
            losses = generator.exponential(3.0, len(ends)).astype(np.float32)
            assert np.array_equal(np.array(spread(ends, ends, losses.tolist()), np.float32), losses)
