"""Gradient rows that a block's backward pass runs on: an unbiased sample of them, or those of the kept tokens.

Rows are drawn with a probability proportional to the norm of their gradient and weighted by its inverse, so that the
weighted rows are on average all of them (importance sampling; what it adds to the gradient's variance is known from
the norms alone). Nothing here waits for the device: the number of rows is fixed, and missing ones are filled up with
rows of weight 0.

Shapes: N gradient rows held here, M of them drawn; C numbers of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_slm.config.backward import STEPS


class Drawn(NamedTuple):
    """Rows, and what each of their gradients is multiplied by."""

    row_M: Tensor
    """Distinct row numbers, int64 [M]: those drawn ascending, then those that fill up."""
    weight_M: Tensor
    """1 / probability, and 0 for rows that fill up; [M] in the norms' precision, fp64 at most."""


def row_count(share: float, num_rows: int) -> int:
    """`ceil(share * num_rows)`, the product rounded to 9 decimals first, so that 0.7 of 10 is 7."""
    return min(num_rows, math.ceil(round(share * num_rows, 9)))


def inclusion(norm_N: Tensor, count: int) -> Tensor:
    """Each row's probability of being drawn, fp64 [N]: `min(1, n / tau)` with `tau` such that they add up to `count`.

    Rows of norm 0 get 0. Rows whose norm is not finite get 1, so that a bad step is seen. Where at most `count` rows
    are left, each gets 1.

    Args:
        norm_N: norms of the gradient rows, 0 or more.
        count: rows to draw, at least 1.
    """
    return inclusions(norm_N, [count])[0]


def inclusions(norm_N: Tensor, counts: Sequence[int]) -> Tensor:
    """`inclusion` for each of several counts, fp64 [C, N]."""
    bad_N = ~norm_N.isfinite()
    norm_N = norm_N.double().masked_fill(bad_N, 0.0)
    num_bad, is_positive_N = bad_N.sum(), norm_N > 0
    left_C1 = torch.stack([count - num_bad for count in counts]).clamp(min=0)[:, None]
    sorted_N = norm_N.sort(descending=True).values
    tail_N = sorted_N.flip(0).cumsum(0).flip(0)  # [k]: sum of all but the k largest
    free_CN = left_C1 - torch.arange(len(norm_N), device=norm_N.device)  # [k]: draws left if the k largest are sure
    fits_CN = (sorted_N * free_CN <= tail_N) & (free_CN > 0)
    # the first k that fits: the largest of the others is drawn at most once
    sure_C1 = fits_CN.byte().argmax(dim=1, keepdim=True)
    factor_C1 = free_CN.gather(1, sure_C1) / tail_N[sure_C1]
    probability_CN = (norm_N * factor_C1).clamp(max=1.0)
    all_fit_C1 = is_positive_N.sum() <= left_C1
    probability_CN = torch.where(all_fit_C1, is_positive_N.double(), probability_CN.nan_to_num(0.0))
    return probability_CN.masked_fill(bad_N, 1.0)


def systematic(probability_N: Tensor, count: int, uniform: float) -> Drawn:
    """`count` rows, of which row j is drawn with its probability, by one number (systematic sampling).

    Row j is drawn where `floor(c_j + u) > floor(c_{j-1} + u)`, c the running sum of the probabilities.

    Args:
        uniform: in [0, 1).
    """
    reached_N = torch.floor(probability_N.cumsum(0).clamp(max=float(count)) + uniform)
    before_N = torch.cat([reached_N.new_zeros(1), reached_N[:-1]])  # floor(u) is 0
    # a sure row is drawn even where the running sum was rounded down, and a row of probability 0 never is
    drawn_N = ((reached_N > before_N) | (probability_N == 1.0)) & (probability_N > 0)
    row_M = torch.sort(~drawn_N, stable=True).indices[:count]
    weight_N = torch.where(drawn_N, 1.0 / probability_N.masked_fill(~drawn_N, 1.0), 0.0)
    return Drawn(row_M, weight_N[row_M])


def nonzero_rows(norm_N: Tensor, count: int) -> Drawn:
    """All rows whose norm is not 0, of which there are at most `count`, with weight 1, and rows that fill up."""
    zero_N = norm_N == 0.0
    row_M = torch.sort(zero_N, stable=True).indices[:count]
    return Drawn(row_M, (~zero_N).to(norm_N.dtype)[row_M])


def added_variance(norm_N: Tensor, probability_N: Tensor) -> Tensor:
    """The variance that a draw with these probabilities adds to the gradient: `sum((1/p - 1) n^2)`, fp64 [...].

    Args:
        probability_N: [..., N].
    """
    excess_N = torch.where(probability_N > 0, 1.0 / probability_N.clamp(min=1e-300) - 1.0, 0.0)
    return (excess_N * _squares(norm_N)).sum(-1)


def _squares(norm_N: Tensor) -> Tensor:
    """Squares of the finite norms, fp64 [N]."""
    return norm_N.double().masked_fill(~norm_N.isfinite(), 0.0).square()


def uniform_number(*key: int) -> float:
    """A number in [0, 1) that is a hash of the key: the same in every process, and independent of all other keys'."""
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


class Measured(NamedTuple):
    """Sums over the finite rows of a block's gradient, fp64 [] each."""

    added: Tensor
    """Added variance of the draw."""
    added_if_fewer: Tensor
    """The same with 1 / STEPS of the rows less."""
    squares: Tensor
    """sum(n^2)."""


@dataclass(frozen=True, kw_only=True)
class BackwardRows:
    """The choice of rows in the blocks' backward passes of one micro-batch."""

    kind: Literal["sampled", "kept"]
    share: Callable[[int], float]
    """Share of the rows, by block (counted through the model)."""
    most: Callable[[int], int | None] = lambda _: None
    """Upper bound of a block's rows with a gradient, by block; None for all."""
    key: tuple[int, ...]
    """Key of the draws of this micro-batch: the run's seed, the step, the micro-batch's number in the step."""
    is_bounded: bool = True
    """Rows of the kind `kept` are at most their share of those held here: no device is waited for. Of a micro-batch
    whose rows lie on several ranks one may have more: they are counted once, in the first backward pass."""
    measured: dict[int, tuple[float, Measured | None]] = field(default_factory=dict)
    """By block: the share of the rows, and the sums of a sampled one."""
    _count: list[int] = field(default_factory=list)

    def draw(self, norm_N: Tensor, *, block: int, part: int) -> Drawn:
        """Draw the rows of one block's backward pass.

        Args:
            norm_N: norms of the gradient rows of the block's output, the same bits wherever the same rows are held.
            part: number of these rows' part of the micro-batch.
        """
        num_rows = len(norm_N)
        count = row_count(self.share(block), num_rows)
        if self.kind == "kept":
            count = count if self.is_bounded else self._counted(norm_N)
            self.measured[block] = count / num_rows, None
            return nonzero_rows(norm_N, count)
        most = self.most(block) or num_rows
        fewer = max(1, min(most, count - row_count(1 / STEPS, num_rows)))
        count = min(most, count)
        probability_CN = inclusions(norm_N, [count, fewer])
        added, added_if_fewer = added_variance(norm_N, probability_CN)
        self.measured[block] = count / num_rows, Measured(added, added_if_fewer, _squares(norm_N).sum())
        return systematic(probability_CN[0], count, uniform_number(*self.key, block, part))

    def _counted(self, norm_N: Tensor) -> int:
        """Rows that have a gradient in the first block of a backward pass; no other row gets one below it."""
        if not self._count:
            self._count.append(max(1, int((norm_N != 0.0).sum())))
        return self._count[0]
