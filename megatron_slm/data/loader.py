"""Loads micro-batches by absolute position, so that `consumed_samples` is the only state to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.arithmetic import ceil_div
from megatron_slm.data.reading import PADDING_ID, Sample
from megatron_slm.data.sampler import sample_indices
from megatron_slm.data.samples import Samples
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.types import Documents, MicroBatch


def num_global_batches(num_samples: int, global_batch_size: int) -> int:
    """Return the number of global batches that hold `num_samples` samples, the last one padded."""
    return ceil_div(num_samples, global_batch_size)


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """Treatment of the boundaries between documents, under the names of Megatron's flags.

    A document ends at the end of its sequence of the corpus, and after `eod_id`.

    Raises:
        ConfigError: `eod_mask_loss` without an `eod_id`.
    """

    eod_id: int | None = None
    """The end-of-document token."""
    eod_mask_loss: bool = False
    """Mask labels that follow an end-of-document *input*: the first token of a document cannot be predicted."""
    reset_attention_mask: bool = False
    """Let tokens attend to their own document only; the first token of a document is no label."""
    reset_position_ids: bool = False
    """Count positions from the start of each document."""

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod_id is None:
            rule = "be used with a tokenizer that has an end-of-document token"
            raise ConfigError("--eod-mask-loss", True, rule, "use such a tokenizer, or remove --eod-mask-loss")

    @property
    def matter_to_layers(self) -> bool:
        """True if every layer needs the boundaries, not just the loss."""
        return self.reset_attention_mask or self.reset_position_ids

    def starts(self, sample: Sample) -> npt.NDArray[np.bool_]:
        """Return True for each label that is the first token of a document, bool [s]."""
        starts = np.zeros(sample.tokens.size + 1, dtype=np.bool_)
        starts[sample.starts] = True
        if self.eod_id is not None:
            starts[1:] |= sample.tokens == self.eod_id
        return starts[1:-1]


NO_BOUNDARIES = Boundaries()


class MicroBatchSource:
    """The micro-batches of one data-parallel rank, with random access.

    With `pads_at_end`, positions beyond the last sample yield samples without a valid label, so that a held-out set is
    read whole and each of its samples counts once, for any batch size and number of ranks. Without it, reading beyond
    the end raises an error, so that training never continues on padding.

    Args:
        samples: the samples to load.
        micro_batch_size: samples of a micro-batch, `b`.
        data_parallel_rank: rank that reads the micro-batches.
        data_parallel_size: number of data-parallel ranks.
        vocab_size: bound of the token ids, which must be in [0, vocab_size).
        boundaries: treatment of the boundaries between documents.
        pads_at_end: whether to pad beyond the last sample.

    Raises:
        IndexError: (on reading) the sample does not exist, and the end is not padded.
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
        for flag, value in (("--micro-batch-size", micro_batch_size), ("--vocab-size", vocab_size)):
            if value < 1:
                raise ConfigError(flag, value, "be at least 1", "choose a larger one")
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
        """Load micro-batch `micro_step` of the step that starts at `consumed_samples` (see `sample_indices`).

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
            _columns(samples),
        )

    def _sample(self, index: int) -> Sample:
        length = self.samples.sequence_length
        if self._pads_at_end and index >= len(self.samples):
            return Sample(np.full(length + 1, PADDING_ID), np.zeros(length, np.bool_), np.empty(0, np.int64))
        sample = self.samples[index]
        lowest, highest = int(sample.tokens.min()), int(sample.tokens.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise VocabularyError(
                f"{self.samples.name}: token id in sample {index}",
                highest if highest >= self._vocab_size else lowest,
                f"be in [0, {self._vocab_size}), the vocabulary of this run",
                "tokenize the corpus again with this run's tokenizer, or name the tokenizer it was made with",
            )
        return sample


def _columns(samples: Sequence[Sample]) -> dict[str, torch.Tensor] | None:
    """Stack the samples' columns, fp32 [b, s] each; 0 for samples of padding. None where there is no column."""
    names = {name: None for sample in samples for name in sample.columns}
    if not names:
        return None
    zero = np.zeros(samples[0].valid.size, np.float32)
    return {name: torch.from_numpy(np.stack([x.columns.get(name, zero) for x in samples])) for name in names}


def _documents(label_starts_bs: npt.NDArray[np.bool_], boundaries: Boundaries) -> Documents:
    """Build the documents of a micro-batch's inputs from the labels that start a document."""
    b, s = label_starts_bs.shape
    starts_bs = np.concatenate([np.ones((b, 1), np.bool_), label_starts_bs[:, :-1]], axis=1)
    starts = np.flatnonzero(starts_bs)
    cumulative = np.append(starts, b * s)
    position_bs = None
    if boundaries.reset_position_ids:
        start_of_token = np.repeat(starts, np.diff(cumulative))
        position_bs = torch.from_numpy((np.arange(b * s) - start_of_token).reshape(b, s))
    if not boundaries.reset_attention_mask:
        return Documents(None, None, position_bs)
    return Documents(tuple(np.diff(cumulative).tolist()), torch.from_numpy(cumulative.astype(np.int32)), position_bs)
