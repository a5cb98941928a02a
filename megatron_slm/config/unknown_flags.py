"""One error for all unknown flags of a command line or a YAML file, each with its fix; another for repeated ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_slm.config.megatron_flags import way_over
from megatron_slm.config.rules import flag
from megatron_slm.errors import ConfigError, suggest_name


def unknown_flags(source: str, names: Sequence[str], known: Iterable[str]) -> ConfigError:
    """Return the error for unknown names.

    Args:
        source: where they are: `flag`, or `run.yaml: key`.
        names: as typed; at least one.
        known: every known flag, with its dashes.
    """
    known = list(known)
    fixes = [_fix(name, known) for name in names]
    if len(names) == 1:
        return ConfigError(source, names[0], "be a known flag", fixes[0])
    listed = "; ".join(f"{name}: {fix}" for name, fix in zip(names, fixes, strict=True))
    return ConfigError(f"{source}s", ", ".join(names), "be known flags", listed)


def repeated_flags(names: Sequence[str]) -> ConfigError:
    """Return the error for flags that were used more than once; at least one, as typed."""
    one, fix = len(names) == 1, "keep one; a list's values follow each other after one flag"
    return ConfigError("flag" if one else "flags", ", ".join(names), "be used once", fix)


def _fix(name: str, known: Sequence[str]) -> str:
    return way_over(name) or suggest_name(flag(name.lstrip("-")), known, "see --help for all flags")
