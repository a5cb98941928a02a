"""Micro-batches: shifted labels, masks, padding beyond the end, and the same samples for any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_slm.data.loader import Boundaries, MicroBatchSource, num_global_batches
from megatron_slm.data.packing import PackedSamples, SequentialSamples
from megatron_slm.data.samples import Samples
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.corpora import make_corpus
from tests.data.megatron_oracle import EOD_ID, gpt_dataset


def source(samples: Samples, *, micro_batch_size: int = 1, rank: int = 0, size: int = 1, **options) -> MicroBatchSource:
    """Make a source with the defaults of these tests."""
    return MicroBatchSource(
        samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
        **{"vocab_size": 60_000, "pads_at_end": True, **options},
    )


@pytest.fixture
def held_out(tmp_path: Path) -> SequentialSamples:
    """22 tokens, 21 labels, in six samples of four."""
    return SequentialSamples(make_corpus(tmp_path / "c", [10, 12]), 0, 2, sequence_length=4)


def test_labels_are_the_next_tokens(held_out: SequentialSamples) -> None:
    batch = source(held_out, micro_batch_size=2).micro_batch(2, 0)
    assert batch.tokens_bs.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert batch.labels_bs.tolist() == [[9, 10, 11, 12], [13, 14, 15, 16]]
    assert batch.valid_bs.tolist() == [[True] * 4] * 2
    assert batch.tokens_bs.dtype == batch.labels_bs.dtype == torch.int64
    assert batch.valid_bs.dtype == torch.bool
    assert all(tensor.is_contiguous() for tensor in batch if tensor is not None)


def test_beyond_the_end_nothing_is_valid(held_out: SequentialSamples) -> None:
    batch = source(held_out, micro_batch_size=3).micro_batch(5, 0)
    assert batch.tokens_bs.tolist() == [[20, 21, 0, 0], [0] * 4, [0] * 4]
    assert batch.valid_bs.tolist() == [[True, False, False, False], [False] * 4, [False] * 4]


def test_training_never_continues_on_padding(held_out: SequentialSamples) -> None:
    with pytest.raises(IndexError, match="sample 6 of"):
        source(held_out, pads_at_end=False).micro_batch(6, 0)


@pytest.mark.parametrize(
    ("micro_batch_size", "size", "accumulation"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 2), (1, 5, 1)]
)
def test_every_held_out_label_counts_once_at_any_layout(
    held_out: SequentialSamples, micro_batch_size: int, size: int, accumulation: int
) -> None:
    global_batch_size = micro_batch_size * size * accumulation
    labels = []
    for step in range(num_global_batches(len(held_out), global_batch_size)):
        for rank in range(size):
            ranks_source = source(held_out, micro_batch_size=micro_batch_size, rank=rank, size=size)
            for micro_step in range(accumulation):
                batch = ranks_source.micro_batch(step * global_batch_size, micro_step)
                labels += batch.labels_bs[batch.valid_bs].tolist()
    assert sorted(labels) == list(range(1, 22))


def test_num_global_batches() -> None:
    assert [num_global_batches(count, 4) for count in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_any_position_may_be_read_in_any_order(held_out: SequentialSamples) -> None:
    loader = source(held_out, micro_batch_size=2)
    forward = [loader.micro_batch(at, 0) for at in (0, 2, 4)]
    backward = [source(held_out, micro_batch_size=2).micro_batch(at, 0) for at in (4, 2, 0)][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


def test_batches_and_eod_mask_are_megatrons(tmp_path: Path) -> None:
    """Token ids repeat every 7, so that Megatron's end-of-document id (0) is all over the corpus."""
    corpus = make_corpus(tmp_path / "c", [9, 11, 4, 13], vocab_size=7)
    order = {"sequence_length": 5, "num_samples": 12, "seed": 3}
    theirs = gpt_dataset(tmp_path / "c", range(4), eod_mask_loss=True, **order)
    ours = source(
        PackedSamples(corpus, 0, 4, **order),
        vocab_size=7,
        boundaries=Boundaries(eod_id=EOD_ID, eod_mask_loss=True),
        micro_batch_size=2,
    )
    masked = 0
    for start in range(0, 12, 2):
        batch = ours.micro_batch(start, 0)
        for row in range(2):
            expected = theirs[start + row]
            assert torch.equal(batch.tokens_bs[row], expected["tokens"])
            assert torch.equal(batch.labels_bs[row], expected["labels"])
            assert torch.equal(batch.valid_bs[row], expected["loss_mask"].bool())
            masked += int((~batch.valid_bs[row]).sum())
    assert masked > 0


def test_without_the_option_nothing_is_masked(tmp_path: Path) -> None:
    samples = SequentialSamples(make_corpus(tmp_path / "c", [9], vocab_size=3), 0, 1, sequence_length=8)
    assert source(samples, boundaries=Boundaries(eod_id=0)).micro_batch(0, 0).valid_bs.all()


@pytest.mark.parametrize(("first_id", "vocab_size", "value"), [(0, 17, 17), (-3, 17, -3)])
def test_token_id_outside_the_vocabulary(tmp_path: Path, first_id: int, vocab_size: int, value: int) -> None:
    corpus = make_corpus(tmp_path / "c", [18], dtype="int32", first_id=first_id)
    samples = SequentialSamples(corpus, 0, 1, sequence_length=17)
    message = rf"/c: token id in sample 0 is {value}: must be in \[0, 17\)"
    with pytest.raises(VocabularyError, match=message):
        source(samples, vocab_size=vocab_size).micro_batch(0, 0)


def test_bad_options(held_out: SequentialSamples) -> None:
    with pytest.raises(
        ConfigError, match="--eod-mask-loss is True: must be used with a tokenizer that has an end-of-document token"
    ):
        source(held_out, boundaries=Boundaries(eod_mask_loss=True))
    with pytest.raises(ConfigError, match="--micro-batch-size is 0: must be at least 1"):
        source(held_out, micro_batch_size=0)
    with pytest.raises(ConfigError, match="--vocab-size is 0: must be at least 1"):
        source(held_out, vocab_size=0)
    with pytest.raises(ValueError, match="data-parallel rank 1 must be within"):
        source(held_out, rank=1, size=1).micro_batch(0, 0)
