"""The tools' command lines."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import pytest

from megatron_slm.cli.arguments import ToolParser, positive_int
from megatron_slm.cli.command import run_command
from megatron_slm.errors import ConfigError, CorpusError


@pytest.fixture
def parser() -> ToolParser:
    """Flags of several kinds, one of them required."""
    parser = ToolParser("A tool.", prog="tool")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--workers", type=positive_int, default=1)
    parser.add_argument("--kind", choices=["x", "y"])
    parser.add_argument("--count", type=int)
    return parser


def test_flags(parser: ToolParser) -> None:
    flags = parser.parse_flags(["--output-prefix=a", "--workers", "3"])
    assert (flags.output_prefix, flags.workers) == ("a", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worker", "3"], "command line is '--worker': must be a flag of tool. Fix: did you mean --workers?"),
        (
            ["--output_prefix=a"],
            "command line is '--output_prefix': must be a flag of tool. Fix: did you mean --output-prefix?",
        ),
        (
            ["--output-prefix", "a", "--workers=2", "--workers", "3"],
            "flag is '--workers': must be used once. Fix: keep one; a list's values follow each other after one flag",
        ),
        (["--zzz"], "command line is '--zzz': must be a flag of tool. Fix: see --help for the flags"),
        (["--workers", "2"], "--output-prefix is missing: required by tool. Fix: add it; see --help"),
        (
            ["--output-prefix", "a", "--workers", "0"],
            "--workers is '0': must be a whole number of at least 1. Fix: see --workers in --help",
        ),
        (["--output-prefix", "a", "--kind", "z"], "--kind is 'z': must be one of x, y. Fix: see --kind in --help"),
        (["--output-prefix", "a", "--count", "z"], "--count is 'z': must be of type int. Fix: see --count in --help"),
        (
            ["--output-prefix", "a", "--count"],
            "--count is '': must have a value (expected one argument). Fix: see --count in --help",
        ),
        (
            ["--output-prefix", "a", "stray"],
            "command line is 'stray': must be known flags and their values. Fix: see --help",
        ),
    ],
)
def test_bad_command_lines(parser: ToolParser, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parser.parse_flags(arguments)
    assert str(raised.value).replace("'x', 'y'", "x, y") == message


LISTS = {
    "analyze_tokens": ["selection", "--output", "a.html", "--load", "A", "--load", "B"],
    "evaluate": ["--model", "m", "--task", "gsm8k=a", "--task", "math=b"],
    "plan": ["layout", "--gpu", "h100", "--nodes", "1", "--nodes", "2"],
    "convert": ["export", "--output", "a", "--load", "A", "--load", "B"],
    "score": ["--output", "a", "--output", "b"],
    "inspect_data": ["--documents", "1", "--documents", "2"],
    "report": ["run", "--output", "a.html", "--output", "b.html"],
    "preprocess": ["--input", "a", "--input", "b"],
    "supervise": ["--max-restarts", "1", "--max-restarts", "2", "--", "pretrain_slm.py"],
}


@pytest.mark.parametrize("command", LISTS)
def test_every_command_refuses_repeated_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = LISTS[command]
    repeated = next(word for word in words if words.count(word) == 2)
    code = importlib.import_module(f"megatron_slm.cli.{command}").main(words)
    assert code != 0
    assert f"error: flag is '{repeated}': must be used once." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "²", ""])
def test_positive_int(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of at least 1"):
        positive_int(text)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(words: Sequence[str]) -> None:
        raise CorpusError("--input", "a\nb", "be\nreadable", "check the path")

    assert run_command(lambda words: None, []) == 0
    assert run_command(lambda words: 3, []) == 3
    assert capsys.readouterr().err == ""
    assert run_command(fail, []) == 1
    error = capsys.readouterr().err
    assert error == "error: --input is 'a\\nb': must be readable. Fix: check the path\n"
    assert run_command(fail, [], exit_code=lambda error: error.exit_code_at_start) == 2


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(words: Sequence[str]) -> None:
        raise KeyboardInterrupt

    assert run_command(interrupt, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def bug(words: Sequence[str]) -> None:
        raise ZeroDivisionError

    assert run_command(bug, []) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.rstrip().endswith("ZeroDivisionError")
