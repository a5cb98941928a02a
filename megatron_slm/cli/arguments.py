"""The command lines of the tools: errors of the user end as one line, unknown flags with the nearest."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_slm.errors import ConfigError, SlmError


class ToolParser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises ConfigError for what it cannot use."""

    def __init__(self, description: str, *, prog: str | None = None, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_flags(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line (or `arguments`).

        Raises:
            ConfigError: a flag is unknown (the nearest known one is named), missing, or has a bad value.
        """
        unknown = [word for word in (sys.argv[1:] if arguments is None else arguments) if self._is_unknown(word)]
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
            fix = f"did you mean {near[0]}?" if near else "see --help for the flags"
            raise ConfigError("command line", flag, "is not a flag of this tool", fix)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("command line", self.prog, message, "see --help for the flags")

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


def exit_code(run: Callable[[], None]) -> int:
    """Run a tool: 0, or after one line on standard error 1 for an error the user can mend, 130 for Ctrl-C."""
    try:
        run()
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n".replace("\n", " ").rstrip() + "\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    return 0
