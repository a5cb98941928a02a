"""What tokens are ranked by: functions of what the two models say of each token, under their names.

Every score is high where a token should be kept. L is the model's token loss, H its entropy, L_RM and H_RM
the reference's; all in nats, fp32 [N].
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_slm.errors import ConfigError

RELATIVE_FLOOR_NATS = 0.01
"""Reference losses below this count as this in `relative-excess`: a certain reference makes no infinite ratio."""

Need = Literal["reference-loss", "reference-entropy", "entropy", "uniform"]


class ScoreInputs(NamedTuple):
    """What scores may read, fp32 [N] each; None where no score of the run asked for it."""

    loss_N: Tensor
    entropy_N: Tensor | None = None
    reference_loss_N: Tensor | None = None
    reference_entropy_N: Tensor | None = None
    uniform_N: Tensor | None = None
    """A random number of the token's own, in [0, 1)."""


def _given(x_N: Tensor | None) -> Tensor:
    assert x_N is not None, "a score is computed only where what it needs is there"
    return x_N


def excess_loss(token_loss_N: Tensor, reference_loss_N: Tensor) -> Tensor:
    """Token loss minus reference loss, signed, in nats (Rho-1, equation 3): high where there is more to learn."""
    return token_loss_N - reference_loss_N


def _excess(x: ScoreInputs) -> Tensor:
    return excess_loss(x.loss_N, _given(x.reference_loss_N))


def _loss(x: ScoreInputs) -> Tensor:
    return x.loss_N


def _low_loss(x: ScoreInputs) -> Tensor:
    return -x.loss_N


def _low_reference_loss(x: ScoreInputs) -> Tensor:
    return -_given(x.reference_loss_N)


def _low_reference_entropy(x: ScoreInputs) -> Tensor:
    return -_given(x.reference_entropy_N)


def _entropy(x: ScoreInputs) -> Tensor:
    return _given(x.entropy_N)


def _relative_excess(x: ScoreInputs) -> Tensor:
    return _excess(x) / _given(x.reference_loss_N).clamp(min=RELATIVE_FLOOR_NATS)


def _clipped_excess(x: ScoreInputs) -> Tensor:
    return _excess(x).clamp(min=0.0)


def _random(x: ScoreInputs) -> Tensor:
    return _given(x.uniform_N)


@dataclass(frozen=True)
class Score:
    """One way of ranking."""

    name: str
    function: Callable[[ScoreInputs], Tensor]
    needs: frozenset[Need]
    formula: str
    source: str

    @property
    def needs_reference(self) -> bool:
        """Whether it cannot be computed without a reference model."""
        return bool(self.needs & {"reference-loss", "reference-entropy"})

    def of(self, inputs: ScoreInputs) -> Tensor:
        """The score of every token, fp32 [N]; high is kept."""
        return self.function(inputs).to(torch.float32)


def _table(*scores: Score) -> dict[str, Score]:
    return {score.name: score for score in scores}


SCORES = _table(
    Score("excess", _excess, frozenset({"reference-loss"}), "L - L_RM", "Rho-1, equation 3"),
    Score("loss", _loss, frozenset(), "L", "ESLM (arXiv 2505.19893), its loss variant"),
    Score("-loss", _low_loss, frozenset(), "-L", "its opposite: the easy tokens, a control"),
    Score(
        "reference-loss",
        _low_reference_loss,
        frozenset({"reference-loss"}),
        "-L_RM",
        "Rho-1, section 3.4 and appendix H (self-reference)",
    ),
    Score(
        "reference-entropy",
        _low_reference_entropy,
        frozenset({"reference-entropy"}),
        "-H_RM, H_RM = -sum_v P_RM(v) log P_RM(v)",
        "Rho-1, section 3.4 and appendix H (self-reference)",
    ),
    Score("entropy", _entropy, frozenset({"entropy"}), "H", "ESLM (arXiv 2505.19893), its entropy variant"),
    Score(
        "relative-excess",
        _relative_excess,
        frozenset({"reference-loss"}),
        f"(L - L_RM) / max(L_RM, {RELATIVE_FLOOR_NATS})",
        "the excess in units of the reference's loss",
    ),
    Score(
        "clipped-excess",
        _clipped_excess,
        frozenset({"reference-loss"}),
        "max(L - L_RM, 0)",
        "DoReMi (arXiv 2305.10429), which clips the excess at 0",
    ),
    Score(
        "random",
        _random,
        frozenset({"uniform"}),
        "a hash of (seed, sample, position) in [0, 1)",
        "the control that the paper leaves out",
    ),
)
"""Every score, by its name for --slm-score."""


def score_named(name: str) -> Score:
    """The score of a name.

    Raises:
        ConfigError: there is none, with the nearest one.
    """
    if name not in SCORES:
        near = difflib.get_close_matches(name, SCORES, n=1, cutoff=0.5)
        known = ", ".join(SCORES)
        raise ConfigError(
            "--slm-score",
            name,
            f"is one of {known}",
            f"did you mean {near[0]}?" if near else "choose one of them",
        )
    return SCORES[name]
