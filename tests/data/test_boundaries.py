"""Boundaries at end-of-document tokens are megatron-core's: the mask, the positions, and the labels that count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.loader import Boundaries, MicroBatchSource
from megatron_slm.data.packing import PackedSamples
from tests.data import megatron_oracle  # noqa: F401  (silences its imports)

EOD, LENGTH = 7, 24


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> PackedSamples:
    """One sequence of many documents, whose ends are marked by the token alone."""
    prefix = tmp_path_factory.mktemp("eod") / "c"
    tokens = np.random.default_rng(0).integers(0, 9, size=2000)
    tokens[100:104] = EOD  # documents of one token
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        writer.add_document(tokens)
    return PackedSamples(IndexedCorpus(prefix), 0, 1, sequence_length=LENGTH, num_samples=None, seed=1)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("reset_position_ids", [False, True])
@pytest.mark.parametrize("reset_attention_mask", [False, True])
def test_equals_megatrons_masks_and_positions(
    samples: PackedSamples, eod_mask_loss: bool, reset_position_ids: bool, reset_attention_mask: bool
) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    flags = {"reset_position_ids": reset_position_ids, "reset_attention_mask": reset_attention_mask}
    source = MicroBatchSource(
        samples,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        vocab_size=100,
        boundaries=Boundaries(eod_id=EOD, eod_mask_loss=eod_mask_loss, **flags),
    )
    for start in range(0, len(samples) - 1, 2):
        batch = source.micro_batch(start, 0)
        for row in range(2):
            masked_ss, loss_mask, position = _get_ltor_masks_and_position_ids(
                batch.tokens_bs[row].clone(), EOD, reset_position_ids, reset_attention_mask, eod_mask_loss, True
            )
            valid = loss_mask.bool()
            if reset_attention_mask:  # ours leaves out the first token of a document, which sees nothing before it
                valid &= batch.tokens_bs[row] != EOD
            assert torch.equal(batch.valid_bs[row], valid)
            documents = batch.documents
            assert (documents is not None) == (reset_position_ids or reset_attention_mask)
            if reset_position_ids:
                assert torch.equal(documents.position_bs[row], position)
            if reset_attention_mask:
                lengths = torch.tensor(documents.lengths)
                assert documents.cumulative.tolist() == [0, *lengths.cumsum(0).tolist()]
                number = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(2, LENGTH)[row]
                seen_ss = (number[:, None] == number) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
                assert torch.equal(~seen_ss, masked_ss[0])
