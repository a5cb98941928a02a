"""Row sampling of a run's backward passes: the draws' keys, the blocks' shares, and the variance measured in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_slm.config.backward import STEPS, BackwardConfig
from megatron_slm.loss.objective import StepSettings
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.selection.selector import Selector


@dataclass(frozen=True)
class RowSums:
    """Sums over the micro-batches of a step and all ranks, by block of the model."""

    rows: tuple[float, ...]
    """Share of the rows that the backward pass ran on."""
    added: tuple[float, ...]
    """Added variance: sum((1/p - 1) n^2)."""
    added_if_fewer: tuple[float, ...]
    """Added variance of a draw with a sixteenth of the rows less."""
    squares: tuple[float, ...]
    """sum(n^2)."""

    @property
    def variances(self) -> list[float]:
        """Added variance of each block, relative to the squared norm of its gradient; NaN for a gradient of zeros."""
        return list(map(_quotient, self.added, self.squares))

    def next_shares(self, shares: Sequence[int], target: float, ends: tuple[int, int]) -> list[int]:
        """The blocks' shares of the next step, in sixteenths: one more, one less, or the same.

        Args:
            shares: those of this step.
            target: added variance that a block may have.
            ends: lowest and highest share.
        """
        following = []
        for share, now, fewer in zip(
            shares, self.variances, map(_quotient, self.added_if_fewer, self.squares), strict=True
        ):
            change = 1 if now > target else -1 if fewer <= target else 0  # neither of NaN
            following.append(min(ends[1], max(ends[0], share + change)))
        return following


def _quotient(total: float, squares: float) -> float:
    return total / squares if squares else math.nan


@dataclass(kw_only=True)
class RowSampler:
    """Chooses the rows of the backward passes of this rank's blocks, and collects what they measure in a step."""

    config: BackwardConfig
    selector: Selector
    seed: int
    num_blocks: int
    """Blocks of the whole model."""
    num_samples: int
    """Samples of a micro-batch, of `length` tokens."""
    length: int
    data_rank: int
    data_size: int
    cuts_sequences: bool = False
    """A micro-batch's rows lie on several ranks, unevenly."""
    counts_here: bool
    """True on the one rank that reports of rows that several ranks hold."""
    last: RowSums | None = None
    """Sums of the last step, the same on every rank; None before the first."""
    _passes: dict[int, BackwardRows] = field(default_factory=dict)

    def of_micro_batch(self, number: int, settings: StepSettings) -> BackwardRows:
        """The rows' choice in one micro-batch's backward pass.

        Draws are keyed by the number of the micro-batch over all data-parallel ranks, so that they do not depend on
        the layout.

        Args:
            number: of the micro-batch on this data-parallel rank.
        """
        shares = [self._share(block, settings) for block in range(self.num_blocks)]
        most: dict[int, int] = {}
        if self.selector.keeps_a_share:  # what follows the last block mixes no rows: only kept tokens have a gradient
            most[self.num_blocks - 1] = self.selector.most_kept(settings.step, self.num_samples, self.length)
        self._passes[number] = BackwardRows(
            kind="kept" if self.config.backward_rows == "kept" else "sampled",
            share=shares.__getitem__,
            most=most.get,
            key=(self.seed, settings.step, number * self.data_size + self.data_rank),
            is_bounded=not self.cuts_sequences,
        )
        return self._passes[number]

    def _share(self, block: int, settings: StepSettings) -> float:
        if self.config.backward_rows == "kept":
            most = self.selector.most_kept(settings.step, self.num_samples, self.length)
            return most / (self.num_samples * self.length)
        if self.config.backward_row_share is not None:
            return self.config.backward_row_share
        assert settings.row_shares is not None, "a controlled run passes its shares"
        return settings.row_shares[block] / STEPS

    def first_shares(self, resumed: Sequence[int]) -> list[int]:
        """Shares of the first step, in sixteenths; empty where nothing controls them.

        Args:
            resumed: those of a checkpoint, kept within the range; where it has none, every block takes the highest.
        """
        lowest, highest = self.config.sixteenths
        if not self.config.is_controlled:
            return []
        shares = resumed if len(resumed) == self.num_blocks else [highest] * self.num_blocks
        return [min(highest, max(lowest, share)) for share in shares]

    def next_shares(self, shares: Sequence[int], sums: RowSums) -> list[int]:
        """Shares of the next step, in sixteenths, from those of a step and what it measured."""
        if self.config.backward_row_variance is None:
            return []
        return sums.next_shares(shares, self.config.backward_row_variance, self.config.sixteenths)

    def take_table(self, device: torch.device) -> Tensor:
        """Return what this rank's blocks measured in a step, to be summed over ranks (fp64), and start the next."""
        counted = torch.zeros(self.num_blocks, 2, dtype=torch.float64)
        summed = torch.zeros(self.num_blocks, 3, dtype=torch.float64, device=device)
        for number in sorted(self._passes) if self.counts_here else ():  # in an order that no schedule changes
            for block, (share, measured) in self._passes[number].measured.items():
                counted[block] += torch.tensor([share, 1.0], dtype=torch.float64)
                if measured is not None:
                    summed[block] += torch.stack(measured)
        self._passes.clear()
        return torch.cat([counted.to(device), summed], dim=1).flatten()

    def read(self, values: Sequence[float]) -> None:
        """Keep the sums of a table that was summed over ranks."""
        rows, passes, added, fewer, squares = (tuple(values[column::5]) for column in range(5))
        self.last = RowSums(tuple(map(_quotient, rows, passes)), added, fewer, squares)
