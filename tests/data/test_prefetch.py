"""Reading ahead changes no micro-batch, and an unreadable corpus is reported before the step that needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data import reading
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.data.packing import PackedSamples, SequentialSamples
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus


@pytest.fixture
def samples(tmp_path: Path) -> PackedSamples:
    lengths = np.random.default_rng(0).integers(1, 30, size=80).tolist()
    return PackedSamples(make_corpus(tmp_path / "c", lengths), 0, 80, sequence_length=8, num_samples=64, seed=1)


def source(samples: Any) -> MicroBatchSource:
    return MicroBatchSource(samples, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=2, vocab_size=60_000)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_micro_batches_are_those_of_the_source(samples: PackedSamples, num_threads: int) -> None:
    ahead = Prefetcher(source(samples), batch_sizes=BatchSizes.constant(8), num_samples=64, num_threads=num_threads)
    plain = source(samples)
    for consumed in range(0, 64, 8):
        assert ahead.prepare(consumed) is None
        assert len(ahead._ahead) <= 3 * 2, "memory is bounded"
        for micro_step in (0, 1):
            one, other = ahead.micro_batch(consumed, micro_step), plain.micro_batch(consumed, micro_step)
            assert torch.equal(one.tokens_bs, other.tokens_bs)
            assert one.sample_b.tolist() == other.sample_b.tolist()
    ahead.close()
    assert not ahead._ahead


def test_the_next_steps_micro_batches_may_be_taken_early(samples: PackedSamples) -> None:
    ahead = Prefetcher(source(samples), batch_sizes=BatchSizes.constant(8), num_samples=64, num_threads=2)
    ahead.prepare(0)
    taken = [ahead.micro_batch(0, micro_step).sample_b.tolist() for micro_step in range(4)]
    assert ahead.prepare(8) is None
    assert ahead.micro_batch(8, 0).sample_b.tolist() == taken[2], "one that was taken is read again if asked for"
    ahead.close()


def test_a_corpus_that_fails_for_a_moment_is_read_again(
    samples: PackedSamples, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0, 0.0))
    expected, failures, real = samples[3], [2], os.pread

    def failing(*args: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pread", failing)
    assert samples[3].tokens.tolist() == expected.tokens.tolist()
    assert "c.bin (Input/output error): retrying" in caplog.text


def test_a_corpus_that_stays_unreadable_is_reported_before_the_step(
    samples: PackedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0,))
    path = Path(f"{samples.name}.bin")
    ahead = Prefetcher(source(samples), batch_sizes=BatchSizes.constant(8), num_samples=64, num_threads=1)
    os.truncate(path, path.stat().st_size // 2)
    errors = [ahead.prepare(consumed) for consumed in range(0, 64, 8)]
    found = [error for error in errors if error is not None]
    assert found
    assert all(isinstance(error, CorpusError) for error in found)
    assert "c.bin': must be readable in sequence " in str(found[0])
    assert "the file ends at byte" in str(found[0])
    assert "tried 2 times" in str(found[0])
    ahead.close()


@pytest.mark.parametrize("changed", ["a sequence more", "another length"])
def test_a_loss_mask_of_another_corpus(tmp_path: Path, changed: str) -> None:
    corpus = make_corpus(tmp_path / "c", [3, 4, 5])
    mask = make_corpus(tmp_path / "m", [3, 4, 5, 1] if changed == "a sequence more" else [3, 5, 4])
    with pytest.raises(
        CorpusError, match=r"m.idx: (number of sequences|length of sequence 1) is (4|5): must be that of"
    ):
        SequentialSamples(corpus, 0, 3, sequence_length=4, loss_mask=mask)
