"""Checks shared by the sections of the configuration."""

from __future__ import annotations

from megatron_slm.errors import ConfigError


def flag(name: str) -> str:
    """Return the flag of a field: `--keep-last` for `keep_last`."""
    return "--" + name.replace("_", "-")


def require(condition: bool, section: object, name: str, rule: str, fix: str) -> None:
    """Check a rule for the field `name` of a section.

    Raises:
        ConfigError: the condition is false; names the field's flag and value.
    """
    if not condition:
        raise ConfigError(flag(name), getattr(section, name), rule, fix)


def require_given(condition: bool, name: str, required_by: str, fix: str) -> None:
    """Check that the field `name` is set where another flag requires it.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError.missing(flag(name), required_by, fix)


def require_positive(section: object, *names: str) -> None:
    """Check that the fields are positive or None."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, section, name, "be positive", "use a number above 0")


def require_not_negative(section: object, *names: str) -> None:
    """Check that the fields are 0 or more."""
    for name in names:
        require(getattr(section, name) >= 0, section, name, "be at least 0", "use 0 or more")
