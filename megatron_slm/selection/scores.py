"""Scores of --slm-score as functions of both models' token statistics; `config/scores.py` has their formulas.

High scores are kept. All inputs and outputs are fp32 [N], in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.config.scores import (
    EXTERNAL,
    RELATIVE_FLOOR_NATS,
    SCORE_DEFINITIONS,
    ScoreDefinition,
    score_definition,
)
from megatron_slm.errors import ConfigError


class ScoreInputs(NamedTuple):
    """Inputs of scores and weights, fp32 [N] each; None where none of the run needs it."""

    loss_N: Tensor
    entropy_N: Tensor | None = None
    reference_loss_N: Tensor | None = None
    reference_entropy_N: Tensor | None = None
    uniform_N: Tensor | None = None
    """Random number of each token, in [0, 1)."""
    top_entropy_N: Tensor | None = None
    """Entropy of the renormalized `TOP_LOGITS` most likely tokens."""
    columns: Mapping[str, Tensor] | None = None
    """Numbers of the tokens from columns beside the corpus, by name."""


@dataclass(frozen=True)
class Score(ScoreDefinition):
    """A score and its function."""

    function: Callable[[ScoreInputs], Tensor]

    def of(self, inputs: ScoreInputs) -> Tensor:
        """Return the score of every token, fp32 [N]."""
        return self.function(inputs).to(torch.float32)


def needed(x_N: Tensor | None) -> Tensor:
    """Return an input that the score or weight has declared."""
    assert x_N is not None, "a score is computed only with the inputs it needs"
    return x_N


def column(inputs: ScoreInputs, name: str) -> Tensor:
    """Return the numbers of a column, fp32 [N].

    Raises:
        ConfigError: the micro-batch does not have it.
    """
    found_N = (inputs.columns or {}).get(name)
    if found_N is None:
        fix = "pass columns to micro_batch, or choose another score or weight"
        raise ConfigError.missing(f"column {name} of the micro-batch", f"{EXTERNAL}{name}", fix)
    return found_N


def excess_loss(token_loss_N: Tensor, reference_loss_N: Tensor) -> Tensor:
    """Return token loss minus reference loss, signed, in nats (Rho-1, equation 3)."""
    return token_loss_N - reference_loss_N


def _excess(x: ScoreInputs) -> Tensor:
    return excess_loss(x.loss_N, needed(x.reference_loss_N))


def _loss(x: ScoreInputs) -> Tensor:
    return x.loss_N


def _low_loss(x: ScoreInputs) -> Tensor:
    return -x.loss_N


def _low_reference_loss(x: ScoreInputs) -> Tensor:
    return -needed(x.reference_loss_N)


def _low_reference_entropy(x: ScoreInputs) -> Tensor:
    return -needed(x.reference_entropy_N)


def _entropy(x: ScoreInputs) -> Tensor:
    return needed(x.entropy_N)


def _relative_excess(x: ScoreInputs) -> Tensor:
    return _excess(x) / needed(x.reference_loss_N).clamp(min=RELATIVE_FLOOR_NATS)


def _clipped_excess(x: ScoreInputs) -> Tensor:
    return _excess(x).clamp(min=0.0)


def _random(x: ScoreInputs) -> Tensor:
    return needed(x.uniform_N)


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
    definition = score_definition(name)
    if name.startswith(EXTERNAL):
        return Score(**vars(definition), function=partial(column, name=name.removeprefix(EXTERNAL)))
    return SCORES[name]
