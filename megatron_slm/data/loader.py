"""Micro-batches by absolute position: nothing to save and nothing to restore but `consumed_samples`."""

from __future__ import annotations

import numpy as np
import torch

from megatron_slm.data.packing import PADDING_ID, Sample, Samples
from megatron_slm.data.sampler import sample_indices
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.types import MicroBatch


def num_global_batches(num_samples: int, global_batch_size: int) -> int:
    """Global batches that hold every one of `num_samples` samples, the last one partly padding."""
    return -(-num_samples // global_batch_size)


class MicroBatchSource:
    """The micro-batches of one data-parallel rank, at random access.

    With `pads_at_end`, positions beyond the last sample give samples without a valid label, so that a held-out
    set is read whole and each of its samples counts once, whatever the batch size and the number of ranks.
    Without it, reading beyond the end is an error: training never goes on with padding.

    Args:
        samples: what to load from.
        micro_batch_size: samples of a micro-batch, `b`.
        data_parallel_rank: whose micro-batches.
        data_parallel_size: number of data-parallel ranks.
        vocab_size: every token id must be within [0, vocab_size).
        eod_id: the end-of-document token.
        eod_mask_loss: labels that follow an end-of-document *input* do not count (Megatron's
            `--eod-mask-loss`: the first token of a document cannot be told from the one before).

    Raises:
        IndexError: (when read) there is no such sample, and the end is not padded.
        ConfigError: `eod_mask_loss` without an `eod_id`, or a size out of range.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        vocab_size: int,
        eod_id: int | None = None,
        eod_mask_loss: bool = False,
        pads_at_end: bool = False,
    ) -> None:
        if eod_mask_loss and eod_id is None:
            raise ConfigError("eod_mask_loss", True, "needs an end-of-document token", "use a tokenizer with one")
        for field, value in (("micro_batch_size", micro_batch_size), ("vocab_size", vocab_size)):
            if value < 1:
                raise ConfigError(field, value, "must be at least 1", "give a larger one")
        self.samples = samples
        self._pads_at_end = pads_at_end
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._num_ranks = data_parallel_size
        self._vocab_size = vocab_size
        self._masked_input = eod_id if eod_mask_loss else None

    def micro_batch(self, consumed_samples: int, micro_step: int) -> MicroBatch:
        """Micro-batch `micro_step` of the step that starts at `consumed_samples` (see `sample_indices`).

        Raises:
            VocabularyError: a token id is not in the vocabulary.
        """
        indices = sample_indices(
            consumed_samples,
            micro_step,
            micro_batch_size=self._micro_batch_size,
            data_parallel_rank=self._rank,
            data_parallel_size=self._num_ranks,
        )
        samples = [self._sample(index) for index in indices]
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        valid_bs = torch.from_numpy(np.stack([sample.valid for sample in samples]))
        inputs_bs = tokens[:, :-1].contiguous()
        if self._masked_input is not None:
            valid_bs &= inputs_bs != self._masked_input
        return MicroBatch(inputs_bs, tokens[:, 1:].contiguous(), valid_bs, torch.tensor(indices, dtype=torch.int64))

    def _sample(self, index: int) -> Sample:
        length = self.samples.sequence_length
        if self._pads_at_end and index >= len(self.samples):
            return Sample(np.full(length + 1, PADDING_ID, np.int64), np.zeros(length, np.bool_))
        sample = self.samples[index]
        lowest, highest = int(sample.tokens.min()), int(sample.tokens.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise VocabularyError(
                f"token id in sample {index} of {self.samples.name}",
                highest if highest >= self._vocab_size else lowest,
                f"must be within [0, {self._vocab_size}), the vocabulary of this run",
                "tokenize the corpus again with this run's tokenizer, or give the tokenizer it was made with",
            )
        return sample
