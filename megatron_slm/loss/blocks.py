"""The output weight in blocks of vocabulary rows, and products of a block with rows of hidden states.

Shapes: N rows (tokens), K kept rows, d hidden, V vocabulary rows held here, B rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 2048
"""Vocabulary rows per block. It decides the order of summation, so it is fixed, not tuned per run."""


@dataclass(frozen=True)
class VocabularyBlock:
    """A run of rows of the output weight."""

    index: int
    start: int
    weight_Bd: Tensor

    @property
    def size(self) -> int:
        """Number of rows; the last block may be shorter."""
        return self.weight_Bd.shape[0]

    def columns(self, local_label_N: Tensor) -> Tensor:
        """Return each label's column in this block, int64 [N]; -1 where another block has it."""
        column_N = local_label_N - self.start
        return column_N.masked_fill((column_N < 0) | (column_N >= self.size), -1)


def block_sizes(num_vocabulary_rows: int) -> list[int]:
    """Return the number of rows of every block."""
    return [min(BLOCK_SIZE, num_vocabulary_rows - start) for start in range(0, num_vocabulary_rows, BLOCK_SIZE)]


def vocabulary_blocks(weight_Vd: Tensor) -> Iterator[VocabularyBlock]:
    """Cut the weight into its blocks, in order."""
    for index, start in enumerate(range(0, weight_Vd.shape[0], BLOCK_SIZE)):
        yield VocabularyBlock(index, start, weight_Vd[start : start + BLOCK_SIZE])


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return fp64 for fp64 inputs, else fp32: logits, losses and sums are never less precise than fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class BlockMemory:
    """Memory that one block of columns after the other is computed in.

    Args:
        num_rows, num_columns: of the largest block; columns beyond `BLOCK_SIZE` do not count.
        like: a tensor on the device.
        dtype: default: the dtype of logits for products of `like`'s dtype.
    """

    def __init__(self, num_rows: int, num_columns: int, like: Tensor, dtype: torch.dtype | None = None) -> None:
        self._memory = like.new_empty(num_rows * min(num_columns, BLOCK_SIZE), dtype=dtype or accumulation_dtype(like))

    def empty(self, num_rows: int, num_columns: int) -> Tensor:
        """Return uninitialized [rows, columns], in the memory of the block before."""
        return self._memory[: num_rows * num_columns].view(num_rows, num_columns)

    def logits(self, rows_Nd: Tensor, block: VocabularyBlock) -> Tensor:
        """Compute `rows block^T`, [N, B] in fp32 (or fp64): bf16 logits would cost a loss error of 3e-2."""
        out_NB = self.empty(rows_Nd.shape[0], block.size)
        if rows_Nd.dtype == out_NB.dtype:
            return torch.mm(rows_Nd, block.weight_Bd.t(), out=out_NB)
        if rows_Nd.is_cuda:
            return torch.mm(rows_Nd, block.weight_Bd.t(), out_dtype=out_NB.dtype, out=out_NB)
        return torch.mm(rows_Nd.to(out_NB.dtype), block.weight_Bd.to(out_NB.dtype).t(), out=out_NB)


def add_product(total_Kd: Tensor, gradient_KB: Tensor, block: VocabularyBlock) -> None:
    """Compute `total += gradient block`, in the precision of the total."""
    if gradient_KB.dtype == total_Kd.dtype:
        total_Kd.addmm_(gradient_KB, block.weight_Bd)
    elif gradient_KB.is_cuda:
        total_Kd += torch.mm(gradient_KB, block.weight_Bd, out_dtype=total_Kd.dtype)
    else:
        total_Kd.addmm_(gradient_KB.to(total_Kd.dtype), block.weight_Bd.to(total_Kd.dtype))
