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
        self.capacity, self.num_rows = capacity, hidden_Nd.shape[0]
        self.has_room_for_all = capacity >= self.num_rows
        self._sizes = block_sizes(weight_Vd.shape[0], on_gpu=weight_Vd.is_cuda)
        slots = capacity if self.has_room_for_all else capacity + 1  # the last one takes what is not kept
        self._blocks: list[Tensor | None] = [self._empty(hidden_Nd, slots, size, dtype) for size in self._sizes]
        self._scratch = (
            [] if self.has_room_for_all else [self._empty(hidden_Nd, chunk_rows, size, dtype) for size in self._sizes]
        )
        self._slot_N = torch.full((self.num_rows,), -1, dtype=torch.int64, device=hidden_Nd.device)
        self._taken = self._slot_N.new_zeros(())
        """Slots that rows have asked for, counted on the device: the host does not wait for predictions."""
        self._surely_taken = 0
        """Those of rows that no prediction chose, counted on the host."""
        self.max_LN = hidden_Nd.new_empty((len(self._sizes), hidden_Nd.shape[0]), dtype=accumulation_dtype(hidden_Nd))
        """Maxima of the rows after each of the L blocks, which that block's exponentials are relative to."""

    @staticmethod
    def _empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def open(self, num_rows: int) -> list[Tensor] | None:
        """Return the space for a chunk's exponentials, [num_rows, B] a block; None where the stash is surely full."""
        if self._surely_taken >= self.capacity:
            return None
        if not self._scratch:
            first = self._surely_taken
            return [block[first : first + num_rows] for block in self._blocks if block is not None]
        return [scratch[:num_rows] for scratch in self._scratch]

    def close(self, chunk: slice, predicted_R: Tensor | None) -> None:
        """Keep the chunk's rows that are predicted to be needed (None: all), as far as there is space."""
        first, num_rows = self._surely_taken, chunk.stop - chunk.start
        if predicted_R is None:
            self._surely_taken += num_rows
        if not self._scratch:
            self._slot_N[chunk] = torch.arange(first, first + num_rows, device=self._slot_N.device)
            return
        wanted_R = torch.ones_like(self._slot_N[chunk]) if predicted_R is None else predicted_R.long()
        slot_R = self._taken + wanted_R.cumsum(0) - 1
        kept_R = (wanted_R > 0) & (slot_R < self.capacity)
        slot_R = torch.where(kept_R, slot_R, self.capacity)
        for block, scratch in zip(self._blocks, self._scratch, strict=True):
            assert block is not None, "a stash is filled before it is consumed"
            block.index_copy_(0, slot_R, scratch[:num_rows])
        self._slot_N[chunk] = torch.where(kept_R, slot_R, -1)
        self._taken = self._taken + wanted_R.sum()

    def seal(self) -> None:
        """End the forward pass: free the memory that only it needed."""
        self._scratch = []

    def slots(self, kept_K: Tensor) -> Tensor:
        """Return each kept row's slot, int64 [K]; -1 for rows without one."""
        return self._slot_N[kept_K]

    def take(self, index: int, *, release: bool = True) -> Tensor:
        """Return a block's exponentials by slot, [slots, B]; slots that no row has are not initialized.

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
