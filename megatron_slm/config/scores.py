"""Names, inputs and formulas of the scores of --slm-score; `selection/scores.py` computes them.

L and H are the model's token loss and entropy, L_RM and H_RM the reference's; all in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.errors import ConfigError, suggest_name

RELATIVE_FLOOR_NATS = 0.01
"""Least reference loss in the denominator of `relative-excess`, so that a certain reference gives no infinite ratio."""

ScoreInput = Literal["reference-loss", "reference-entropy", "entropy", "uniform"]
"""Inputs of a score besides the token loss."""


@dataclass(frozen=True)
class ScoreDefinition:
    """A score; tokens with high scores are kept."""

    name: str
    needs: frozenset[ScoreInput]
    formula: str
    source: str
    """The paper that defines it, or its purpose."""

    @property
    def needs_reference(self) -> bool:
        """True if the score cannot be computed without a reference model."""
        return bool(self.needs & {"reference-loss", "reference-entropy"})


_LOSS: frozenset[ScoreInput] = frozenset({"reference-loss"})
_DEFINITIONS = (
    ScoreDefinition("excess", _LOSS, "L - L_RM", "Rho-1, equation 3"),
    ScoreDefinition("loss", frozenset(), "L", "ESLM (arXiv 2505.19893), loss variant"),
    ScoreDefinition("-loss", frozenset(), "-L", "control: the easy tokens"),
    ScoreDefinition("reference-loss", _LOSS, "-L_RM", "Rho-1, section 3.4 and appendix H (self-reference)"),
    ScoreDefinition(
        "reference-entropy",
        frozenset({"reference-entropy"}),
        "-H_RM",
        "Rho-1, section 3.4 and appendix H (self-reference)",
    ),
    ScoreDefinition("entropy", frozenset({"entropy"}), "H", "ESLM (arXiv 2505.19893), entropy variant"),
    ScoreDefinition(
        "relative-excess", _LOSS, f"(L - L_RM) / max(L_RM, {RELATIVE_FLOOR_NATS})", "excess relative to the reference"
    ),
    ScoreDefinition("clipped-excess", _LOSS, "max(L - L_RM, 0)", "DoReMi (arXiv 2305.10429)"),
    ScoreDefinition("random", frozenset({"uniform"}), "hash of (seed, sample, position)", "control: random tokens"),
)
SCORE_DEFINITIONS = {definition.name: definition for definition in _DEFINITIONS}
"""Every score by its name for --slm-score."""


def needs_reference(name: str) -> bool:
    """Return True if the score of a name cannot be computed without a reference model."""
    return SCORE_DEFINITIONS[name].needs_reference


def check_score_name(name: str) -> None:
    """Check that a score exists.

    Raises:
        ConfigError: unknown score; suggests the nearest name.
    """
    if name not in SCORE_DEFINITIONS:
        fix = suggest_name(name, SCORE_DEFINITIONS, "choose one of them")
        raise ConfigError("--slm-score", name, f"be one of {', '.join(SCORE_DEFINITIONS)}", fix)


def describe_scores() -> str:
    """Return one line of help for each score: its name, formula and source."""
    width = max(map(len, SCORE_DEFINITIONS))
    return "\n".join(f"{one.name:{width}}  {one.formula}  [{one.source}]" for one in _DEFINITIONS)
