"""Names, inputs and formulas of the scores of --slm-score; `selection/scores.py` computes them.

L and H are the model's token loss and entropy, L_RM and H_RM the reference's; all in nats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_slm.errors import ConfigError, suggest_name

RELATIVE_FLOOR_NATS = 0.01
"""Least reference loss in the denominator of `relative-excess`, so that a certain reference gives no infinite ratio."""

TOP_LOGITS = 20
"""Most likely tokens whose renormalized entropy is the input `top-entropy`."""

EXTERNAL = "external:"
"""Begins the name of a score or weight that is read from a column beside the corpus (`data/corpus/columns.py`)."""

ScoreInput = Literal["reference-loss", "reference-entropy", "entropy", "top-entropy", "uniform", "external"]
"""Inputs of a score or a weight besides the token loss."""


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

    @property
    def is_excess(self) -> bool:
        """True for the excess loss and functions of it."""
        return self.name.endswith("excess")

    @property
    def has_sign(self) -> bool:
        """True if the score is a difference, or a number of one's own: above and below 0 are not the same."""
        return self.is_excess or "external" in self.needs


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


def score_definition(name: str) -> ScoreDefinition:
    """Return the score of a name; `external:NAME` is a column of one's own.

    Raises:
        ConfigError: unknown score; suggests the nearest name.
    """
    if name.startswith(EXTERNAL):
        check_external_name("--slm-score", name)
        return ScoreDefinition(name, frozenset({"external"}), "number of the token", "a column beside the corpus")
    if name not in SCORE_DEFINITIONS:
        fix = suggest_name(name, SCORE_DEFINITIONS, "choose one of them")
        rule = f"be one of {', '.join(SCORE_DEFINITIONS)}, or {EXTERNAL}NAME"
        raise ConfigError("--slm-score", name, rule, fix)
    return SCORE_DEFINITIONS[name]


_COLUMN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_column_name(flag: str, value: str, name: str) -> None:
    """Check the name of a column, which is a part of a file name.

    Raises:
        ConfigError: it has other characters, or is reserved.
    """
    if not _COLUMN_NAME.fullmatch(name) or name == "loss_mask":
        rule = "name a column with letters, digits, '.', '-' and '_', other than loss_mask"
        raise ConfigError(flag, value, rule, "use a name such as quality")


def check_external_name(flag: str, value: str) -> None:
    """Check the column's name in `external:NAME`.

    Raises:
        ConfigError: see `check_column_name`.
    """
    check_column_name(flag, value, value.removeprefix(EXTERNAL))


def describe_scores() -> str:
    """Return one line of help for each score: its name, formula and source."""
    width = max(map(len, SCORE_DEFINITIONS))
    return "\n".join(f"{one.name:{width}}  {one.formula}  [{one.source}]" for one in _DEFINITIONS)
