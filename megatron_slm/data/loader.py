"""Micro-batches by absolute position: nothing to save and nothing to restore but `consumed_samples`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.data.packing import Samples
from megatron_slm.data.reading import PADDING_ID, Sample
from megatron_slm.data.sampler import sample_indices
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.types import Documents, MicroBatch


def num_global_batches(num_samples: int, global_batch_size: int) -> int:
    """Global batches that hold every one of `num_samples` samples, the last one partly padding."""
    return -(-num_samples // global_batch_size)


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """What the ends of documents mean, by Megatron's flags.

    A document ends where its sequence of the corpus does, and after `eod_id`.

    Raises:
        ConfigError: `eod_mask_loss` without an `eod_id`.
    """

    eod_id: int | None = None
    """The end-of-document token."""
    eod_mask_loss: bool = False
    """Labels that follow an end-of-document *input* do not count: the first token of a document cannot be told from
    the one before."""
    reset_attention_mask: bool = False
    """Tokens see their own document only, so the first token of a document is no label."""
    reset_position_ids: bool = False
    """Positions count from the start of each document."""

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod_id is None:
            raise ConfigError("eod_mask_loss", True, "needs an end-of-document token", "use a tokenizer with one")

    @property
    def matter_to_layers(self) -> bool:
        """Whether every layer must know them, not the loss alone."""
        return self.reset_attention_mask or self.reset_position_ids

    def starts(self, sample: Sample) -> npt.NDArray[np.bool_]:
        """Whether a document starts at each token but the first, bool [s]: of labels, whether one is a first token."""
        starts = np.zeros(sample.tokens.size + 1, dtype=np.bool_)
        starts[sample.starts] = True
        if self.eod_id is not None:
            starts[1:] |= sample.tokens == self.eod_id
        return starts[1:-1]


NO_BOUNDARIES = Boundaries()


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
        boundaries: what the ends of documents mean.

    Raises:
        IndexError: (when read) there is no such sample, and the end is not padded.
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        vocab_size: int,
        boundaries: Boundaries = NO_BOUNDARIES,
        pads_at_end: bool = False,
    ) -> None:
        for field, value in (("micro_batch_size", micro_batch_size), ("vocab_size", vocab_size)):
            if value < 1:
                raise ConfigError(field, value, "must be at least 1", "give a larger one")
        self.samples = samples
        self._pads_at_end = pads_at_end
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._num_ranks = data_parallel_size
        self._vocab_size = vocab_size
        self.boundaries = boundaries

    @property
    def samples_together(self) -> int:
        """Samples of one micro-step over all data-parallel ranks."""
        return self._micro_batch_size * self._num_ranks

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
        if self.boundaries.eod_mask_loss:
            valid_bs &= inputs_bs != self.boundaries.eod_id
        documents = None
        if self.boundaries.matter_to_layers:
            starts_bs = np.stack([self.boundaries.starts(sample) for sample in samples])
            if self.boundaries.reset_attention_mask:
                valid_bs &= torch.from_numpy(~starts_bs)
            documents = _documents(starts_bs, self.boundaries)
        return MicroBatch(
            inputs_bs,
            tokens[:, 1:].contiguous(),
            valid_bs,
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor([sample.source for sample in samples], dtype=torch.int64),
            documents,
        )

    def _sample(self, index: int) -> Sample:
        length = self.samples.sequence_length
        if self._pads_at_end and index >= len(self.samples):
            return Sample(np.full(length + 1, PADDING_ID), np.zeros(length, np.bool_), np.empty(0, np.int64))
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


def _documents(label_starts_bs: npt.NDArray[np.bool_], boundaries: Boundaries) -> Documents:
    """Documents of a micro-batch's inputs, from where its labels start one."""
    b, s = label_starts_bs.shape
    starts_bs = np.concatenate([np.ones((b, 1), np.bool_), label_starts_bs[:, :-1]], axis=1)
    starts = np.flatnonzero(starts_bs)
    cumulative = np.append(starts, b * s)
    position_bs = None
    if boundaries.reset_position_ids:
        begun = np.repeat(starts, np.diff(cumulative))
        position_bs = torch.from_numpy((np.arange(b * s) - begun).reshape(b, s))
    if not boundaries.reset_attention_mask:
        return Documents(None, None, position_bs)
    return Documents(tuple(np.diff(cumulative).tolist()), torch.from_numpy(cumulative.astype(np.int32)), position_bs)
