"""Command lines of the tools: no abbreviations or repeated flags; unknown ones refused with the nearest known one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_slm.config.unknown_flags import repeated_flags
from megatron_slm.errors import ConfigError, suggest_name

_REASONS = {
    r"invalid choice: '?(?P<value>.*?)'? \(choose from (.*)\)": "be one of {1}",
    r"invalid (.*) value: '(?P<value>.*)'": "be of type {0}",
    r"'(?P<value>.*)' must (.*)": "{1}",
    r"(?P<value>)(expected .*)": "have a value ({1})",
}
"""argparse's reasons as patterns, and the rule each of them states."""


class ToolParser(argparse.ArgumentParser):
    """An argument parser without abbreviations and repeated flags that raises ConfigError for what it cannot use."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)
        self._seen: set[str] = set()

    def parse_flags(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line (or `arguments`).

        Raises:
            ConfigError: a flag is unknown (the nearest known one is named), missing, or has a bad value.
        """
        unknown = [word for word in (sys.argv[1:] if arguments is None else arguments) if self._is_unknown(word)]
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            fix = suggest_name(flag, self._option_string_actions, "see --help for the flags", cutoff=0.6)
            raise ConfigError("command line", flag, f"be a flag of {self.prog}", fix)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting.

        Raises:
            ConfigError: always; names the flag, its value and the rule that argparse reports.
        """
        if named := re.fullmatch(r"the following arguments are required: (.+)", message):
            raise ConfigError.missing(named[1], self.prog, "add it; see --help")
        if named := re.fullmatch(r"unrecognized arguments: (.+)", message):
            raise ConfigError("command line", named[1], "be known flags and their values", "see --help")
        if (named := re.fullmatch(r"argument ([^:]+): (.+)", message)) is None:
            raise ConfigError("command line", message, "follow the usage", "see --help")
        flag, reason = named[1].split("/")[-1].split()[0], named[2]
        for pattern, rule in _REASONS.items():
            if found := re.fullmatch(pattern, reason, re.DOTALL):
                raise ConfigError(flag, found["value"], rule.format(*found.groups()), f"see {flag} in --help")
        raise ConfigError(flag, reason, "follow the usage", f"see {flag} in --help")

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse what is known of a command line; see `argparse.ArgumentParser.parse_known_args`."""
        self._seen.clear()
        return super().parse_known_args(*args, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse a flag's second occurrence, of which argparse would drop the first without a word."""
        if action.option_strings and action.nargs != 0:
            flag = action.option_strings[-1]
            if flag in self._seen:
                raise repeated_flags([flag])
            self._seen.add(flag)
        return super()._get_values(action, arg_strings)

    def _is_unknown(self, word: str) -> bool:
        return word.startswith("--") and word.split("=", 1)[0] not in self._option_string_actions


def positive_int(text: str) -> int:
    """A whole number of at least 1, for `type=`.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
