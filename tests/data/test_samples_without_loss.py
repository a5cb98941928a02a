"""Samples without a trained token are counted exactly, and left out or kept."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data.best_fit import BestFitSamples
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.sidecar import loss_mask_prefix
from megatron_slm.data.packing import PackedSamples
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.data.trained_tokens import TrainedTokens
from megatron_slm.errors import CorpusError
from megatron_slm.flags.load import parse
from megatron_slm.run.corpora import open_data
from tests.support.runs import flags, run_flags


def write_masked(prefix: Path, masks: list[list[int]]) -> tuple[IndexedCorpus, IndexedCorpus]:
    """Write a corpus and its loss mask, one list of 0 and 1 a document."""
    mask_prefix = loss_mask_prefix(prefix)
    with IndexedCorpusWriter(prefix, "uint16") as tokens, IndexedCorpusWriter(mask_prefix, "uint8") as trained:
        for mask in masks:
            tokens.add_document(np.arange(len(mask)) % 50)
            trained.add_document(np.array(mask))
    return IndexedCorpus(prefix), IndexedCorpus(mask_prefix)


MASKS = st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=90), min_size=1, max_size=12).filter(
    lambda masks: sum(map(len, masks)) > 8 and max(map(len, masks)) > 1
)


@pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])
@settings(max_examples=40, deadline=None)
@given(masks=MASKS, num_samples=st.sampled_from([1, 5, 40]))
def test_counts_are_those_of_the_samples_read(
    tmp_path_factory: pytest.TempPathFactory,
    kind: type[PackedSamples] | type[BestFitSamples],
    masks: list[list[int]],
    num_samples: int,
) -> None:
    corpus, mask = write_masked(tmp_path_factory.mktemp("masked") / "c", masks)
    samples = kind(corpus, 0, len(masks), sequence_length=7, num_samples=num_samples, seed=3, loss_mask=mask)
    expected = [int(samples[index].valid.sum()) for index in range(len(samples))]
    assert samples.trained_labels(TrainedTokens(mask)).tolist() == expected


PROMPTS = [[0] * 40 + [1] * 3, [0] * 64, [0, 1] * 16]


def opened(folder: Path, num_samples: int, **changes: str) -> BlendedSamples:
    config, _ = parse(flags(run_flags(folder / "c", folder / "run", vocab_size=60, seq_length=8, **changes)))
    return open_data(
        config, build_tokenizer("NullTokenizer", None, 60), 61, num_samples, batch_sizes=BatchSizes.constant(2)
    ).train


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_dropped_samples_are_replaced_and_the_others_keep_their_order(tmp_path: Path, packing: str) -> None:
    write_masked(tmp_path / "c", PROMPTS)
    kept, dropped = (opened(tmp_path, 60, samples_without_loss=how, packing=packing) for how in ("keep", "drop"))
    with_loss = [kept[i].tokens.tolist() for i in range(60) if kept[i].valid.any()]
    assert 5 < len(with_loss) < 40
    found = [dropped[i] for i in range(60)]
    assert all(sample.valid.any() for sample in found)
    assert [sample.tokens.tolist() for sample in found[: len(with_loss)]] == with_loss
    assert kept.order_fingerprint != dropped.order_fingerprint


def test_kept_samples_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_masked(tmp_path / "c", PROMPTS)
    caplog.set_level(logging.INFO)
    kept = opened(tmp_path, 16, samples_without_loss="keep")
    order = kept.sources[0].orders[0]
    num_empty = sum(not order[i].valid.any() for i in range(len(order)))
    assert f"{num_empty} of {len(order)} samples have no trained token" in caplog.text
    caplog.clear()
    opened(tmp_path, 16, samples_without_loss="drop")
    assert "without a trained token" in caplog.text
    write_masked(tmp_path / "c", [[1] * 40])
    caplog.clear()
    opened(tmp_path, 4)
    assert "trained token" not in caplog.text


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_a_corpus_whose_samples_are_all_masked_is_refused(tmp_path: Path, how: str) -> None:
    write_masked(tmp_path / "c", [[1] + [0] * 40])  # the trained token is the first: no label
    with pytest.raises(CorpusError, match="samples with a trained token is 0: must be at least one of 5"):
        opened(tmp_path, 4, samples_without_loss=how)


def test_a_rewritten_mask_is_counted_anew(tmp_path: Path) -> None:
    write_masked(tmp_path / "c", PROMPTS)
    first = opened(tmp_path, 16, samples_without_loss="drop")
    write_masked(tmp_path / "c", [[0] * 43, [1] * 64, [0] * 32])
    second = opened(tmp_path, 16, samples_without_loss="drop")
    assert all(second[i].valid.any() for i in range(16))
    assert first.order_fingerprint != second.order_fingerprint
