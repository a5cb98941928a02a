"""Commands in the pages: found, and parsed by the tools' own parsers without running them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import tomllib

from megatron_slm.cli import commands as console_scripts
from megatron_slm.cli.arguments import ToolParser
from megatron_slm.config.load import parse

ROOT = Path(__file__).parents[2]
SUBCOMMANDS = {"convert", "plan", "analyze_tokens", "checkpoint"}
WITH_RUN_FLAGS = {"pretrain", "score", "preflight", "replay", "inspect_data", "plan"}
"""Commands that also take the flags of a run."""


@functools.cache
def modules() -> dict[str, str]:
    """The module in `megatron_slm/cli` of every console script and of every file in tools/ that calls one."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    of_function = {}
    for name in set(re.findall(r":(\w+)$", "\n".join(scripts.values()), re.M)):
        (module,) = [word for word in getattr(console_scripts, name).__code__.co_consts if _is_module(word)]
        of_function[name] = module
    found = {script: of_function[target.partition(":")[2]] for script, target in scripts.items()}
    for path in (ROOT / "tools").glob("*.py"):
        if called := re.search(r"^from megatron_slm\.cli\.commands import (\w+)$", path.read_text(), re.M):
            found[path.name] = of_function[called[1]]
    return found


def _is_module(word: object) -> bool:
    return isinstance(word, str) and (ROOT / f"megatron_slm/cli/{word}.py").is_file()


def blocks(path: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def command_lines(path: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks, as words; continued lines are joined, comments dropped."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def tool_commands(path: Path) -> Iterator[list[str]]:
    """The tools in a page's command lines, each with its own words: a launcher's words before it are left out."""
    for words in command_lines(path):
        starts = [i for i, word in enumerate(words) if Path(word).name in modules()]
        if any(word in ("$(", "|", ";") for word in words):
            continue
        for start, end in zip(starts, [*starts[1:], len(words)][: len(starts)], strict=True):
            yield words[start:end]


@functools.cache
def help_text(module: str, subcommand: str | None) -> str:
    """What a command prints for --help."""
    output = io.StringIO()
    words = [subcommand, "--help"] if subcommand else ["--help"]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(f"megatron_slm.cli.{module}").main(words)
    return output.getvalue()


class Parsed(BaseException):
    """Ends a command once its words are parsed."""


def check_words(module: str, words: Sequence[str]) -> None:
    """Parse a command's words with its own parser, and run nothing.

    Raises:
        SlmError: a flag or its value is wrong.
    """
    if module == "pretrain":
        parse(words)
        return
    depth = 0
    original = ToolParser.parse_known_args

    def parse_known_args(self: ToolParser, *args: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found, rest = original(self, *args, **options)
        finally:
            depth -= 1
        if depth:
            return found, rest
        if rest and module not in WITH_RUN_FLAGS:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            parse(rest, train_iters=1)
        raise Parsed

    run = importlib.import_module(f"megatron_slm.cli.{module}")
    with mock.patch.object(ToolParser, "parse_known_args", parse_known_args), contextlib.suppress(Parsed):
        (getattr(run, "_run", None) or run.run)(list(words))
        raise AssertionError(f"{module} did not parse its words")
