"""Weights of the kept tokens' losses by name; `config/weights.py` has their formulas. All are detached, fp32.

A weight has two parts: `base`, from a token's own statistics, and `finish`, which compares the kept tokens of a scope.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_slm.config.scores import EXTERNAL, TOP_LOGITS
from megatron_slm.config.weights import WEIGHT_DEFINITIONS, Normalization, WeightDefinition, weight_definition
from megatron_slm.selection.policies import soft_weights
from megatron_slm.selection.scope import Scope
from megatron_slm.selection.scores import ScoreInputs, column, needed


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Numbers that the formulas read."""

    power: float = 1.0
    """Exponent a."""
    temperature: float | None = None
    """Divisor T; None: 1 for `gibbs`, the median of the sequences' mean losses for `talr`."""
    floor: float = 0.0
    """Least weight of `gibbs` and `talr`."""


@dataclass(frozen=True)
class Weight(WeightDefinition):
    """A weight and its functions."""

    base: Callable[[ScoreInputs, WeightOptions], Tensor] | None = None
    """From the inputs of each token to fp32 [N]; None: the score."""
    finish: Callable[[Tensor, Tensor, WeightOptions], Tensor] | None = None
    """From the base [b, s] and the kept tokens [b, s] of a scope to the weights [b, s]; None: the base itself."""

    def of(self, inputs: ScoreInputs, options: WeightOptions) -> Tensor | None:
        """Return the base of every token, fp32 [N]; None where it is the score."""
        return None if self.base is None else self.base(inputs, options).float()


def _dft(x: ScoreInputs, _: WeightOptions) -> Tensor:
    return (-x.loss_N).exp()


def _eaft(x: ScoreInputs, options: WeightOptions) -> Tensor:
    return (needed(x.top_entropy_N) / math.log(TOP_LOGITS)).clamp(min=0.0).pow(options.power)


def _focal(x: ScoreInputs, options: WeightOptions) -> Tensor:
    return (-torch.expm1(-x.loss_N)).clamp(min=0.0).pow(options.power)


def _mile(x: ScoreInputs, options: WeightOptions) -> Tensor:
    return (1.0 + needed(x.entropy_N)).pow(options.power)


def _loss(x: ScoreInputs, _: WeightOptions) -> Tensor:
    return x.loss_N


def _column(x: ScoreInputs, _: WeightOptions, name: str) -> Tensor:
    return column(x, name)


def _talr(loss_bs: Tensor, kept_bs: Tensor, options: WeightOptions) -> Tensor:
    temperature: Tensor | float | None = options.temperature
    if temperature is None:
        kept_b = kept_bs.sum(1)
        mean_b = torch.where(kept_bs, loss_bs.double(), 0.0).sum(1) / kept_b
        temperature = mean_b.nanquantile(0.5)  # a sequence without a kept token has no mean
    return (-loss_bs.double() / temperature).exp().clamp(min=options.floor)


def _gibbs(score_bs: Tensor, kept_bs: Tensor, options: WeightOptions) -> Tensor:
    temperature = 1.0 if options.temperature is None else options.temperature
    return soft_weights(score_bs.flatten(), kept_bs.flatten(), temperature, options.floor).view_as(score_bs)


_BASES: dict[str, Callable[[ScoreInputs, WeightOptions], Tensor] | None] = {
    "dft": _dft,
    "eaft": _eaft,
    "focal": _focal,
    "mile": _mile,
    "talr": _loss,
    "gibbs": None,
}
_FINISHES = {"talr": _talr, "gibbs": _gibbs}
WEIGHTS = {
    name: Weight(**vars(one), base=_BASES[name], finish=_FINISHES.get(name)) for name, one in WEIGHT_DEFINITIONS.items()
}
"""Every weight by its name for --slm-weight."""


def weight_named(name: str) -> Weight:
    """Return the weight of a name.

    Raises:
        ConfigError: unknown weight; suggests the nearest name.
    """
    definition = weight_definition(name)
    if name.startswith(EXTERNAL):
        return Weight(**vars(definition), base=partial(_column, name=name.removeprefix(EXTERNAL)))
    return WEIGHTS[name]


def kept_weights(
    weight: Weight | None,
    base_bs: Tensor,
    kept_bs: Tensor,
    factor_bs: Tensor | None,
    *,
    options: WeightOptions,
    normalization: Normalization | None,
    scope: Scope,
) -> Tensor:
    """Compute the weights of the kept tokens, fp32 [b, s]; 0 elsewhere.

    Args:
        weight: None: only `factor_bs`.
        base_bs: from `Weight.of`, or the scores.
        factor_bs: weight of each label's id, which multiplies the others; None: 1.
        normalization: None: the published one.
        scope: the tokens that are compared and whose mean is 1.
    """

    def of_scope(rows: slice) -> Tensor:
        base, kept = base_bs[rows], kept_bs[rows]
        if weight is None:
            found = torch.ones_like(base)
        else:
            found = base if weight.finish is None else weight.finish(base, kept, options)
        if factor_bs is not None:
            found = found * factor_bs[rows]
        published: Normalization = "none" if weight is None else weight.normalization
        has_mean_1 = weight is not None and weight.finish is _gibbs and factor_bs is None
        if (normalization or published) == "mean" and not has_mean_1:
            found = normalized(found, kept)
        return found.masked_fill(~kept, 0.0).float()

    if scope != "sequence":
        return of_scope(slice(None))
    return torch.cat([of_scope(slice(i, i + 1)) for i in range(len(base_bs))])


def normalized(weight_N: Tensor, kept_N: Tensor) -> Tensor:
    """Return the weights divided by their mean over the kept tokens, fp64 [N]; 0 elsewhere, and where all are 0."""
    weight_N = weight_N.double().masked_fill(~kept_N, 0.0)
    total = weight_N.sum()
    return torch.where(total > 0, weight_N * kept_N.sum() / total, 0.0)
