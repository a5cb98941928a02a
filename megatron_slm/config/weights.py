"""Names, inputs and formulas of the weights of --slm-weight; `selection/weights.py` computes them.

L and H are the model's token loss and entropy in nats, p = exp(-L) the label's probability, H_20 the entropy of the
`TOP_LOGITS` most likely tokens, T = --slm-temperature and a = --slm-weight-power. Weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.scores import EXTERNAL, TOP_LOGITS, ScoreInput, check_external_name
from megatron_slm.errors import ConfigError, suggest_name

Normalization = Literal["mean", "none"]
"""mean: the weights of the kept tokens of a scope have mean 1. none: they are used as they are."""


@dataclass(frozen=True)
class WeightDefinition:
    """A weight of kept tokens."""

    name: str
    needs: frozenset[ScoreInput]
    formula: str
    normalization: Normalization
    """The published one, used without --slm-weight-normalization."""
    source: str
    """The paper that defines it, or its purpose."""
    power: float | None = None
    """Default of --slm-weight-power; None for a formula without a."""


_DEFINITIONS = (
    WeightDefinition("dft", frozenset(), "p", "none", "DFT (arXiv 2508.05629)"),
    WeightDefinition(
        "eaft", frozenset({"top-entropy"}), f"(H_20 / ln {TOP_LOGITS})^a", "none", "EAFT (arXiv 2601.02151)", 1.0
    ),
    WeightDefinition("focal", frozenset(), "(1 - p)^a", "none", "focal loss (arXiv 1708.02002)", 2.0),
    WeightDefinition("mile", frozenset({"entropy"}), "(1 + H)^a", "mean", "MiLe (arXiv 2310.19531)", 1.0),
    WeightDefinition(
        "talr",
        frozenset(),
        "exp(-L / T); T: median of the sequences' mean losses",
        "mean",
        "TALR (arXiv 2509.20758)",
    ),
    WeightDefinition(
        "gibbs", frozenset(), "softmax(score / T) over the kept tokens", "mean", "soft selection by --slm-score"
    ),
)
WEIGHT_DEFINITIONS = {definition.name: definition for definition in _DEFINITIONS}
"""Every weight by its name for --slm-weight."""


def weight_definition(name: str) -> WeightDefinition:
    """Return the weight of a name; `external:NAME` is a column of one's own.

    Raises:
        ConfigError: unknown weight; suggests the nearest name.
    """
    if name.startswith(EXTERNAL):
        check_external_name("--slm-weight", name)
        return WeightDefinition(
            name, frozenset({"external"}), "number of the token", "none", "a column beside the corpus"
        )
    if name not in WEIGHT_DEFINITIONS:
        rule = f"be one of {', '.join(WEIGHT_DEFINITIONS)}, or {EXTERNAL}NAME"
        raise ConfigError("--slm-weight", name, rule, suggest_name(name, WEIGHT_DEFINITIONS, "choose one of them"))
    return WEIGHT_DEFINITIONS[name]


def describe_weights() -> str:
    """Return one line of help for each weight: its name, formula, normalization and source."""
    width = max(map(len, WEIGHT_DEFINITIONS))
    return "\n".join(
        f"{one.name:{width}}  {one.formula}, normalization {one.normalization}  [{one.source}]" for one in _DEFINITIONS
    )
