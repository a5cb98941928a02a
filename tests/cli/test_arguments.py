"""The tools' command lines."""

from __future__ import annotations

import argparse

import pytest

from megatron_slm.cli.arguments import ToolParser, exit_code, positive_int
from megatron_slm.errors import ConfigError, CorpusError


@pytest.fixture
def parser() -> ToolParser:
    """Two flags, one of them required."""
    parser = ToolParser("A tool.")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--workers", type=positive_int, default=1)
    return parser


def test_flags(parser: ToolParser) -> None:
    flags = parser.parse_flags(["--output-prefix=a", "--workers", "3"])
    assert (flags.output_prefix, flags.workers) == ("a", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worker", "3"], "command line = '--worker': is not a flag .* did you mean --workers?"),
        (["--output_prefix=a"], "command line = '--output_prefix': .* did you mean --output-prefix?"),
        (["--zzz"], "command line = '--zzz': .* see --help"),
        (["--workers", "2"], "the following arguments are required: --output-prefix"),
        (["--output-prefix", "a", "--workers", "0"], "argument --workers: '0' must be a whole number"),
        (["--output-prefix", "a", "stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_be_used(parser: ToolParser, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parser.parse_flags(arguments)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "²", ""])
def test_positive_int(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of at least 1"):
        positive_int(text)


def test_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise CorpusError("input", "a\nb", "first line\nsecond line", "mend it")

    assert exit_code(lambda: None) == 0
    assert capsys.readouterr().err == ""
    assert exit_code(fail) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: input = ")
    assert error.count("\n") == 1


def test_exit_code_of_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupt) == 130
    assert capsys.readouterr().err == "interrupted\n"
