"""Cache of exp(logit - maximum so far) for the rows likely to need gradients.

The exponential is kept and not the logit: the forward pass has computed it anyway, its relative error in bf16 is 2^-9
whatever the logit's size, and one factor a row turns it into a probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.blocks import accumulation_dtype, block_sizes


class Stash:
    """Space for `capacity` of N rows, in the order of rows; one tensor a vocabulary block, freed as it is consumed.

    Args:
        hidden_Nd, weight_Vd: factors of the logits.
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
        """Maxima of the rows after each of the L blocks, which that block's exponentials are relative to."""

    @staticmethod
    def _empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def open(self, num_rows: int) -> list[Tensor] | None:
        """Return the space for a chunk's exponentials, [num_rows, B] a block; None where the stash is full."""
        if self.used == self.capacity:
            return None
        if not self._scratch:
            return [block[self.used : self.used + num_rows] for block in self._blocks if block is not None]
        return [scratch[:num_rows] for scratch in self._scratch]

    def close(self, chunk: slice, predicted_R: Tensor | None) -> None:
        """Keep the chunk's rows that are predicted to be needed (None: all), as far as there is space."""
        if not self._scratch:
            first, num_rows = self.used, chunk.stop - chunk.start
            self._slot_N[chunk] = torch.arange(first, first + num_rows, device=self._slot_N.device)
            self.used += num_rows
            return
        if predicted_R is None:
            row_K = torch.arange(chunk.stop - chunk.start, device=self._slot_N.device)
        else:
            row_K = predicted_R.nonzero().squeeze(1)
        row_K = row_K[: self.capacity - self.used]
        end = self.used + row_K.numel()
        for block, scratch in zip(self._blocks, self._scratch, strict=True):
            assert block is not None, "a stash is filled before it is consumed"
            torch.index_select(scratch, 0, row_K, out=block[self.used : end])
        self._slot_N[chunk.start + row_K] = torch.arange(self.used, end, device=row_K.device)
        self.used = end

    def seal(self) -> None:
        """End the forward pass: free the memory that only it needed."""
        self._scratch = []

    def slots(self, kept_K: Tensor) -> Tensor:
        """Return each kept row's slot, int64 [K]; -1 for rows without one."""
        return self._slot_N[kept_K]

    def take(self, index: int, *, release: bool = True) -> Tensor:
        """Return a block's exponentials, [capacity, B], of which `used` rows are filled.

        Args:
            release: it is for the last time, and the caller may overwrite it.

        Raises:
            RuntimeError: it was released before.
        """
        block = self._blocks[index]
        if block is None:
            raise RuntimeError("the selective loss can be differentiated once: its stash is consumed on the way")
        if release:
            self._blocks[index] = None
        return block
