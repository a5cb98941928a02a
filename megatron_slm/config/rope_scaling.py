"""Fields of the rotary position embedding's scalings, with Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slm.errors import LayoutError


@dataclass(frozen=True)
class RopeFields:
    """Fields of one `rope_type`."""

    numbers: tuple[str, ...] = ()
    """Positive numbers, required."""
    lists: tuple[str, ...] = ()
    """Lists of a positive number for every rotated pair of a head, required."""
    optional: tuple[str, ...] = ()
    """Positive numbers that may be absent."""
    switches: tuple[str, ...] = ()
    """True or false; may be absent."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.numbers + self.lists + self.optional + self.switches


ROPE_FIELDS = {
    "default": RopeFields(),
    "linear": RopeFields(("factor",)),
    "dynamic": RopeFields(("factor",)),
    "llama3": RopeFields(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": RopeFields(
        ("factor", "original_max_position_embeddings"),
        optional=("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        switches=("truncate",),
    ),
    "longrope": RopeFields(
        ("original_max_position_embeddings",),
        lists=("long_factor", "short_factor"),
        optional=("factor", "attention_factor"),
    ),
}
"""Supported scalings by their `rope_type`."""


def check_rope_scaling(scaling: Mapping[str, Any], *, num_pairs: int) -> None:
    """Check a scaling's fields.

    Args:
        num_pairs: rotated pairs of a head.

    Raises:
        LayoutError: a field is missing, unknown or no positive number; named `rope_scaling.{field}`.
    """
    rope_type = scaling.get("rope_type", "default")
    if rope_type not in ROPE_FIELDS:
        raise LayoutError(
            "rope_scaling.rope_type",
            rope_type,
            f"be one of {', '.join(ROPE_FIELDS)}",
            "use a model with one of these scalings",
        )
    fields = ROPE_FIELDS[rope_type]
    for name in sorted(set(scaling) - {"rope_type", *fields.names}):
        known = "the fields " + ", ".join(fields.names) if fields.names else "no fields"
        raise LayoutError(
            f"rope_scaling.{name}",
            scaling[name],
            f"be absent: rope_type {rope_type} has {known}",
            "remove it, or use a model without it",
        )
    for name in fields.names:
        value = scaling.get(name)
        required = name in fields.numbers or name in fields.lists
        if value is None and not required:
            continue
        rule = _rule(name, value, fields, num_pairs)
        if rule is not None:
            raise LayoutError(f"rope_scaling.{name}", value, f"{rule} with rope_type {rope_type}", "set it")


def _rule(name: str, value: object, fields: RopeFields, num_pairs: int) -> str | None:
    """Return the rule that a field's value breaks, None if it breaks none."""
    if name in fields.switches:
        return None if isinstance(value, bool) else "be true or false"
    if name in fields.lists:
        fits = isinstance(value, list) and len(value) == num_pairs and all(map(_is_positive, value))
        return None if fits else f"be a list of {num_pairs} positive numbers, one for each rotated pair of a head,"
    return None if _is_positive(value) else "be a positive number"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
