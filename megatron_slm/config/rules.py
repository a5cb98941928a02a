"""Rules that several sections check their fields by."""

from __future__ import annotations

from megatron_slm.errors import ConfigError


def require(condition: bool, name: str, value: object, rule: str, fix: str) -> None:
    """Refuse a field's value unless the condition holds.

    Raises:
        ConfigError: it does not.
    """
    if not condition:
        raise ConfigError("--" + name.replace("_", "-"), value, rule, fix)


def require_positive(section: object, *names: str) -> None:
    """Refuse numbers that are 0 or less, where they are given."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, name, value, "is greater than 0", "give a positive number")
