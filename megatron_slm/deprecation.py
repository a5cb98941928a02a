"""Old names of flags and of the Python interface that still work for one minor version, with a warning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Renamed(NamedTuple):
    """A public name that changed."""

    new: str
    """The name that takes its place."""
    removed_in: str
    """First version without the old name, such as `0.4`."""


FLAGS: dict[str, Renamed] = {}
"""Old fields of the configuration, with underscores, by name; flags and YAML keys alike."""
NAMES: dict[str, Renamed] = {}
"""Old names of `from megatron_slm import ...`."""


def current_name(old: str, renamed: Renamed, *, kind: str, show: Callable[[str], str] = str) -> str:
    """Return the new name, and warn: as a `DeprecationWarning`, and in the log, where users of commands see it.

    Args:
        old: the name as typed.
        kind: what it is a name of, for the message.
        show: returns the new name as it is typed.
    """
    text = f"{kind} {old} is deprecated and will be removed in {renamed.removed_in}: use {show(renamed.new)}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    logger.warning("%s", text)
    return renamed.new
