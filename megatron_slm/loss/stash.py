"""Exponentials of logits that the forward pass keeps for the backward pass, of the rows that will need them.

What is kept is `exp(logit - maximum so far)`, not the logit: it is what the forward pass has computed anyway, its
relative error in bf16 is 2^-9 whatever the logit's size, and one factor a row turns it into a probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.blocks import accumulation_dtype, block_sizes


class Stash:
    """Room for `capacity` of N rows, in order of their rows; one tensor a vocabulary block, freed as it is consumed.

    Args:
        hidden_Nd, weight_Vd: what the logits are made of.
        chunk_rows: rows of one chunk of the forward pass.
        dtype: of the exponentials.
    """

    def __init__(
        self, hidden_Nd: Tensor, weight_Vd: Tensor, *, capacity: int, chunk_rows: int, dtype: torch.dtype
    ) -> None:
        self.capacity, self.used = capacity, 0
        self.has_room_for_all = capacity >= hidden_Nd.shape[0]
        self._sizes = block_sizes(weight_Vd.shape[0], on_gpu=weight_Vd.is_cuda)
        self._blocks: list[Tensor | None] = [self._empty(hidden_Nd, capacity, size, dtype) for size in self._sizes]
        self._scratch = (
            [] if self.has_room_for_all else [self._empty(hidden_Nd, chunk_rows, size, dtype) for size in self._sizes]
        )
        self._slot_N = torch.full((hidden_Nd.shape[0],), -1, dtype=torch.int64, device=hidden_Nd.device)
        self.max_LN = hidden_Nd.new_empty((len(self._sizes), hidden_Nd.shape[0]), dtype=accumulation_dtype(hidden_Nd))
        """The rows' maxima after each of the L blocks, which that block's exponentials are relative to."""

    @staticmethod
    def _empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def open(self, num_rows: int) -> list[Tensor] | None:
        """Where a chunk's exponentials go, [num_rows, B] a block; None where there is no room for any."""
        if self.used == self.capacity:
            return None
        if not self._scratch:
            return [block[self.used : self.used + num_rows] for block in self._blocks if block is not None]
        return [scratch[:num_rows] for scratch in self._scratch]

    def close(self, chunk: slice, likely_R: Tensor | None) -> None:
        """Keep the chunk's rows that are likely to be needed (None: all), as far as there is room."""
        if not self._scratch:
            first, num_rows = self.used, chunk.stop - chunk.start
            self._slot_N[chunk] = torch.arange(first, first + num_rows, device=self._slot_N.device)
            self.used += num_rows
            return
        if likely_R is None:
            row_K = torch.arange(chunk.stop - chunk.start, device=self._slot_N.device)
        else:
            row_K = likely_R.nonzero().squeeze(1)
        row_K = row_K[: self.capacity - self.used]
        end = self.used + row_K.numel()
        for block, scratch in zip(self._blocks, self._scratch, strict=True):
            assert block is not None, "a stash is filled before it is consumed"
            torch.index_select(scratch, 0, row_K, out=block[self.used : end])
        self._slot_N[chunk.start + row_K] = torch.arange(self.used, end, device=row_K.device)
        self.used = end

    def seal(self) -> None:
        """The forward pass is over: free what only it needed."""
        self._scratch = []

    def slots(self, kept_K: Tensor) -> Tensor:
        """Each kept row's place here, int64 [K]; -1 where it was not kept."""
        return self._slot_N[kept_K]

    def take(self, index: int) -> Tensor:
        """A block's exponentials, [capacity, B], of which `used` rows are filled.

        Once for each block: it is the caller's from then on, to overwrite.

        Raises:
            RuntimeError: it was taken before.
        """
        block, self._blocks[index] = self._blocks[index], None
        if block is None:
            raise RuntimeError("the selective loss can be differentiated once: its stash is consumed on the way")
        return block
