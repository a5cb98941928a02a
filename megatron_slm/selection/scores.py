"""Scores of --slm-score as functions of both models' token statistics; `config/scores.py` has their formulas.

High scores are kept. All inputs and outputs are fp32 [N], in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.config.scores import RELATIVE_FLOOR_NATS, SCORE_DEFINITIONS, ScoreDefinition, check_score_name


class ScoreInputs(NamedTuple):
    """Inputs of scores, fp32 [N] each; None where no score of the run needs it."""

    loss_N: Tensor
    entropy_N: Tensor | None = None
    reference_loss_N: Tensor | None = None
    reference_entropy_N: Tensor | None = None
    uniform_N: Tensor | None = None
    """Random number of each token, in [0, 1)."""


@dataclass(frozen=True)
class Score(ScoreDefinition):
    """A score and its function."""

    function: Callable[[ScoreInputs], Tensor]

    def of(self, inputs: ScoreInputs) -> Tensor:
        """Return the score of every token, fp32 [N]."""
        return self.function(inputs).to(torch.float32)


def _needed(x_N: Tensor | None) -> Tensor:
    assert x_N is not None, "a score is computed only with the inputs it needs"
    return x_N


def excess_loss(token_loss_N: Tensor, reference_loss_N: Tensor) -> Tensor:
    """Return token loss minus reference loss, signed, in nats (Rho-1, equation 3)."""
    return token_loss_N - reference_loss_N


def _excess(x: ScoreInputs) -> Tensor:
    return excess_loss(x.loss_N, _needed(x.reference_loss_N))


def _loss(x: ScoreInputs) -> Tensor:
    return x.loss_N


def _low_loss(x: ScoreInputs) -> Tensor:
    return -x.loss_N


def _low_reference_loss(x: ScoreInputs) -> Tensor:
    return -_needed(x.reference_loss_N)


def _low_reference_entropy(x: ScoreInputs) -> Tensor:
    return -_needed(x.reference_entropy_N)


def _entropy(x: ScoreInputs) -> Tensor:
    return _needed(x.entropy_N)


def _relative_excess(x: ScoreInputs) -> Tensor:
    return _excess(x) / _needed(x.reference_loss_N).clamp(min=RELATIVE_FLOOR_NATS)


def _clipped_excess(x: ScoreInputs) -> Tensor:
    return _excess(x).clamp(min=0.0)


def _random(x: ScoreInputs) -> Tensor:
    return _needed(x.uniform_N)


_FUNCTIONS: dict[str, Callable[[ScoreInputs], Tensor]] = {
    "excess": _excess,
    "loss": _loss,
    "-loss": _low_loss,
    "reference-loss": _low_reference_loss,
    "reference-entropy": _low_reference_entropy,
    "entropy": _entropy,
    "relative-excess": _relative_excess,
    "clipped-excess": _clipped_excess,
    "random": _random,
}
SCORES = {name: Score(**vars(one), function=_FUNCTIONS[name]) for name, one in SCORE_DEFINITIONS.items()}
"""Every score by its name for --slm-score."""


def score_named(name: str) -> Score:
    """Return the score of a name.

    Raises:
        ConfigError: unknown score; suggests the nearest name.
    """
    check_score_name(name)
    return SCORES[name]
