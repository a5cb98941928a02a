"""Divergences of the model's distribution p from the reference's q, and their gradients in closed form. Pure.

| name | divergence | gradient for the model's logits |
|---|---|---|
| `kl` | sum q log(q / p) | p - q |
| `reverse-kl` | A = sum p log(p / q) | p (log(p / q) - A) |
| `jsd` | s sum q log(q / m) + (1 - s) A, with A = sum p log(p / m) | (1 - s) p (log(p / m) - A) |

In the last, m = s q + (1 - s) p: the generalized Jensen-Shannon divergence of skew s (GKD, arXiv 2306.13649).
docs/distillation.md derives the gradients. All work on a block of columns: the moments of blocks add up, and a gradient
needs the moments of the whole row (those of `kl` only its value does).

Shapes: K rows, B columns of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

DivergenceName = Literal["kl", "reverse-kl", "jsd"]


class Divergence(Protocol):
    """A divergence; logarithms of probabilities are fp32 (or fp64) [K, B]."""

    needs_moments: bool
    """The gradient depends on the moments of the whole row."""

    def moments(self, log_p_KB: Tensor, log_q_KB: Tensor) -> Tensor:
        """Compute the columns' part of `sum p log(p / m)` and `sum q log(q / m)`, [2, K]."""
        ...

    def value(self, moments_2K: Tensor) -> Tensor:
        """Compute the divergence of each row from its moments, nats [K]."""
        ...

    def slope(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        """Compute the gradient for the model's logits, divided by p, [K, B]."""
        ...

    def gradient(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        """Compute the gradient for the model's logits, [K, B]."""
        ...


class _Forward:
    needs_moments = False

    def moments(self, log_p_KB: Tensor, log_q_KB: Tensor) -> Tensor:
        second_K = _expected(log_q_KB, log_q_KB - log_p_KB)
        return torch.stack([torch.zeros_like(second_K), second_K])

    def value(self, moments_2K: Tensor) -> Tensor:
        return moments_2K[1]

    def slope(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        return -torch.expm1(log_q_KB - log_p_KB)

    def gradient(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        return log_p_KB.exp().sub_(log_q_KB.exp())


class _Reverse:
    needs_moments = True

    def moments(self, log_p_KB: Tensor, log_q_KB: Tensor) -> Tensor:
        first_K = _expected(log_p_KB, log_p_KB - log_q_KB)
        return torch.stack([first_K, torch.zeros_like(first_K)])

    def value(self, moments_2K: Tensor) -> Tensor:
        return moments_2K[0]

    def slope(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        return (log_p_KB - log_q_KB).sub_(moments_2K[0][:, None])

    def gradient(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        return self.slope(log_p_KB, log_q_KB, moments_2K).mul_(log_p_KB.exp())


@dataclass(frozen=True)
class _JensenShannon:
    skew: float
    needs_moments = True

    def moments(self, log_p_KB: Tensor, log_q_KB: Tensor) -> Tensor:
        log_m_KB = self._log_mixture(log_p_KB, log_q_KB)
        return torch.stack([_expected(log_p_KB, log_p_KB - log_m_KB), _expected(log_q_KB, log_q_KB - log_m_KB)])

    def value(self, moments_2K: Tensor) -> Tensor:
        return (1 - self.skew) * moments_2K[0] + self.skew * moments_2K[1]

    def slope(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        log_m_KB = self._log_mixture(log_p_KB, log_q_KB)
        return torch.sub(log_p_KB, log_m_KB, out=log_m_KB).sub_(moments_2K[0][:, None]).mul_(1 - self.skew)

    def gradient(self, log_p_KB: Tensor, log_q_KB: Tensor, moments_2K: Tensor) -> Tensor:
        return self.slope(log_p_KB, log_q_KB, moments_2K).mul_(log_p_KB.exp())

    def _log_mixture(self, log_p_KB: Tensor, log_q_KB: Tensor) -> Tensor:
        return torch.logaddexp(log_q_KB + math.log(self.skew), log_p_KB + math.log1p(-self.skew))


def _expected(log_weight_KB: Tensor, log_ratio_KB: Tensor) -> Tensor:
    """Sum `weight * log_ratio` over the columns; 0 for a weight of 0, whatever the ratio."""
    most = torch.finfo(log_ratio_KB.dtype).max  # 0 times it is 0, where 0 times infinity is not a number
    return log_ratio_KB.clamp_(-most, most).mul_(log_weight_KB.exp()).sum(1)


def divergence_named(name: DivergenceName, *, skew: float) -> Divergence:
    """Return a divergence.

    Args:
        skew: of `jsd`, in (0, 1): the weight of q in the mixture.
    """
    plain: dict[DivergenceName, Divergence] = {"kl": _Forward(), "reverse-kl": _Reverse()}
    return plain.get(name) or _JensenShannon(skew)
