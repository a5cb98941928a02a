"""Spreads losses of one tokenization of a text over the tokens of another, by characters.

A tokenization is the list of its tokens' ends (`Tokenizer.encode_with_ends`). Where ends meet, both are cut into
groups; the losses of a group's source tokens are added up and divided among its target tokens by characters.

Shapes: S source tokens, T target tokens, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Groups of two tokenizations of one text."""

    source_stops: npt.NDArray[np.int64]
    """Number of source tokens up to the end of each group, int64 [G]."""
    target_stops: npt.NDArray[np.int64]
    """Number of target tokens up to the end of each group, int64 [G]."""
    target_ends: npt.NDArray[np.int64]
    """Characters up to the end of each target token, int64 [T]."""

    @classmethod
    def of(cls, source_ends: Sequence[int], target_ends: Sequence[int]) -> Alignment:
        """Align tokenizations with the same last end. Equal ones give a group for each token."""
        stops: list[tuple[int, int]] = []
        i = j = 0
        while i < len(source_ends) and j < len(target_ends):
            i, j = i + 1, j + 1
            while source_ends[i - 1] != target_ends[j - 1]:
                if source_ends[i - 1] < target_ends[j - 1]:
                    i += 1
                else:
                    j += 1
            stops.append((i, j))
        if stops:
            stops[-1] = len(source_ends), len(target_ends)  # tokens without a character of their own at the end
        sources, targets = zip(*stops, strict=True) if stops else ((), ())
        return cls(
            source_stops=np.array(sources, np.int64),
            target_stops=np.array(targets, np.int64),
            target_ends=np.array(target_ends, np.int64),
        )

    def groups_of(self, start: int, stop: int) -> slice:
        """Return the groups that hold the target tokens [start, stop)."""
        first, last = np.searchsorted(self.target_stops, [start, stop - 1], side="right").tolist()
        return slice(first, last + 1)

    def sources_of(self, groups: slice) -> slice:
        """Return the source tokens of groups."""
        return slice(_start(self.source_stops, groups.start), int(self.source_stops[groups.stop - 1]))

    def targets_of(self, groups: slice) -> slice:
        """Return the target tokens of groups."""
        return slice(_start(self.target_stops, groups.start), int(self.target_stops[groups.stop - 1]))

    def spread(self, loss_S: npt.NDArray[np.float32], groups: slice) -> npt.NDArray[np.float32]:
        """Spread the losses of the source tokens of groups over their target tokens, fp32.

        What rounding to fp32 takes from a token is added to the next one, so that both sums are equal to half the last
        bit of the last loss. A group of one token each keeps its loss bit for bit. A token counts as one character at
        least.
        """
        found: list[np.float32] = []
        carried = 0.0
        source, target = _start(self.source_stops, groups.start), _start(self.target_stops, groups.start)
        first = source
        for source_stop, target_stop in zip(self.source_stops[groups], self.target_stops[groups], strict=True):
            left = math.fsum([*loss_S[source - first : source_stop - first].tolist(), carried])
            ends = self.target_ends[target:target_stop]
            begin = int(self.target_ends[target - 1]) if target else 0
            widths = np.maximum(np.diff(ends, prepend=begin), 1).tolist()
            width_left = sum(widths)
            for width in widths:
                rounded = np.float32(left * (width / width_left))
                found.append(rounded)
                left, width_left = left - float(rounded), width_left - width
            carried, source, target = left, source_stop, target_stop
        return np.array(found, np.float32)


def _start(stops: npt.NDArray[np.int64], group: int) -> int:
    return int(stops[group - 1]) if group else 0
