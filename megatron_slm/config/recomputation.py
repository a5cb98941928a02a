"""The rule of what a stage's blocks keep for their backward passes, and what they compute again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["full", "selective"]


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """A rule for the blocks of a stage."""

    granularity: Granularity | None = None
    """full: a block keeps nothing but its input, or that of its unit. selective: its input and the results of its
    products. None: everything."""
    method: Literal["uniform", "block"] = "uniform"
    """With full. uniform: units of `num_layers` blocks keep the first one's input. block: the first `num_layers` of
    the stage keep their inputs, the others everything."""
    num_layers: int = 1

    def units(self, num_blocks: int) -> list[int]:
        """Sizes of the runs of blocks that are computed again together, from the stage's first block on."""
        if self.granularity != "full":
            return []
        if self.method == "block":
            return [1] * min(self.num_layers, num_blocks)
        whole, rest = divmod(num_blocks, self.num_layers)
        return [self.num_layers] * whole + [rest] * (rest > 0)

    def kinds(self, num_blocks: int) -> list[tuple[int, Granularity | None]]:
        """Runs of a stage's blocks that compute the same again: how many, and what."""
        if self.granularity != "full":
            return [(num_blocks, self.granularity)]
        whole = sum(self.units(num_blocks))
        runs: list[tuple[int, Granularity | None]] = [(whole, "full"), (num_blocks - whole, None)]
        return [run for run in runs if run[0]] or runs[:1]


KEEP_ALL = Recomputation()
