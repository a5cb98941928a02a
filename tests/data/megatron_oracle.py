"""Megatron-core's reader, writer and sample order, without its start-up warnings: the oracle for ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    logging.disable(logging.NOTSET)

__all__ = ["IndexedDataset", "IndexedDatasetBuilder", "gpt_dataset", "megatron_bounds"]

EOD_ID = 0


class StubTokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    vocab_size = 60_000
    eod = EOD_ID

    def __init__(self) -> None:
        self.unique_identifiers = {"class": type(self).__name__}


def gpt_dataset(
    prefix: Path,
    sequences: Sequence[int],
    *,
    sequence_length: int,
    num_samples: int | None,
    seed: int,
    eod_mask_loss: bool = False,
) -> GPTDataset:
    """Build Megatron's training samples of these sequences."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / f"cache-{prefix.name}"),
        tokenizer=StubTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )
    indices = np.array(sequences, dtype=np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GPTDataset(IndexedDataset(str(prefix)), str(prefix), indices, num_samples, Split.train, config)


def megatron_bounds(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """Return the sequences of train, validation and test, as Megatron's dataset builder cuts them."""
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return [
        None if ends is None else (round(ends[0] * float(num_sequences)), round(ends[1] * float(num_sequences)))
        for ends in matrix
    ]
