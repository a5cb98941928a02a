"""The output weight in blocks of vocabulary rows, and products of a block with rows of hidden states.

Shapes: N rows (tokens), K kept rows, d hidden, V vocabulary rows held here, B rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_slm.loss.soft_cap import cap_

BLOCK_SIZE = 2048
"""Vocabulary rows per block on the CPU. It decides the order of summation, so it is fixed, not tuned per run."""
GPU_BLOCK_SIZE = 8192
"""The same on a GPU, where a block costs a handful of launches and a product of 2048 columns leaves processors idle."""


def block_size(*, on_gpu: bool) -> int:
    """Vocabulary rows per block on a kind of device."""
    return GPU_BLOCK_SIZE if on_gpu else BLOCK_SIZE


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
        """Return each label's column in this block, int64 [N]; outside [0, size) where another block has it."""
        return local_label_N - self.start


def block_sizes(num_vocabulary_rows: int, *, on_gpu: bool) -> list[int]:
    """Return the number of rows of every block."""
    size = block_size(on_gpu=on_gpu)
    return [min(size, num_vocabulary_rows - start) for start in range(0, num_vocabulary_rows, size)]


def vocabulary_blocks(weight_Vd: Tensor) -> Iterator[VocabularyBlock]:
    """Cut the weight into its blocks, in order."""
    start = 0
    for index, size in enumerate(block_sizes(weight_Vd.shape[0], on_gpu=weight_Vd.is_cuda)):
        yield VocabularyBlock(index, start, weight_Vd[start : start + size])
        start += size


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return fp64 for fp64 inputs, else fp32: logits, losses and sums are never less precise than fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class BlockMemory:
    """Memory that one block of columns after the other is computed in.

    Args:
        num_rows, num_columns: of the largest block; columns beyond `block_size` do not count.
        like: a tensor on the device.
        dtype: default: the dtype of logits for products of `like`'s dtype.
        softcap: of the logits.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        like: Tensor,
        dtype: torch.dtype | None = None,
        *,
        softcap: float | None = None,
    ) -> None:
        self._softcap = softcap
        num_columns = min(num_columns, block_size(on_gpu=like.is_cuda))
        self._memory = like.new_empty(num_rows * num_columns, dtype=dtype or accumulation_dtype(like))

    def empty(self, num_rows: int, num_columns: int) -> Tensor:
        """Return uninitialized [rows, columns], in the memory of the block before."""
        return self._memory[: num_rows * num_columns].view(num_rows, num_columns)

    def logits(self, rows_Nd: Tensor, block: VocabularyBlock) -> Tensor:
        """Compute `rows block^T`, capped, [N, B] in fp32 (or fp64): bf16 logits would cost a loss error of 3e-2."""
        return cap_(self._product(rows_Nd, block), self._softcap)

    def _product(self, rows_Nd: Tensor, block: VocabularyBlock) -> Tensor:
        out_NB = self.empty(rows_Nd.shape[0], block.size)
        if rows_Nd.dtype == out_NB.dtype:
            return torch.mm(rows_Nd, block.weight_Bd.t(), out=out_NB)
        if rows_Nd.is_cuda:
            return torch.mm(rows_Nd, block.weight_Bd.t(), out_dtype=out_NB.dtype, out=out_NB)
        return torch.mm(rows_Nd.to(out_NB.dtype), block.weight_Bd.to(out_NB.dtype).t(), out=out_NB)


@lru_cache(maxsize=8)
def _multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Try, once, to add a product of half-precision matrices to a fp32 matrix in one kernel; old torch refuses it."""
    total, factor = torch.ones(8, 8, device=device), torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9.0).all().item())


def add_product(total_Kd: Tensor, gradient_KB: Tensor, block: VocabularyBlock) -> None:
    """Compute `total += gradient block`, in the precision of the total."""
    if gradient_KB.dtype == total_Kd.dtype:
        total_Kd.addmm_(gradient_KB, block.weight_Bd)
    elif gradient_KB.is_cuda:
        if _multiplies_into_fp32(total_Kd.device, gradient_KB.dtype):
            torch.addmm(total_Kd, gradient_KB, block.weight_Bd, out_dtype=total_Kd.dtype, out=total_Kd)
        else:
            total_Kd += torch.mm(gradient_KB, block.weight_Bd, out_dtype=total_Kd.dtype)
    else:
        total_Kd.addmm_(gradient_KB.to(total_Kd.dtype), block.weight_Bd.to(total_Kd.dtype))
