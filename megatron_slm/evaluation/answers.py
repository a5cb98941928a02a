"""Extraction of answers from a model's output, and their comparison with the correct ones.

Extraction follows the harness of Rho-1's authors: the last `\\boxed{...}`, else the text after the last "the answer
is" (or "the final answer is", or GSM8K's "####"), else the last number. Numbers are compared as exact fractions,
ignoring thousands separators, currency signs, units, percent signs and LaTeX. Other answers are compared by
math-verify (https://github.com/huggingface/Math-Verify).
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import Literal

from megatron_slm.errors import TaskError

AnswerKind = Literal["number", "math", "choice"]
Rules = Literal["strict", "paper"]
"""`paper` also accepts numbers that are a hundredth or a hundred times the answer (percent) or that round to it, as
the authors' harness does."""

_MARK = re.compile(r"(?:[tT]he (?:final )?answer is|####|[aA]nswer:)\s*:?\s*")
_HOPE = re.compile(r"\.?\s*I hope it is correct\.?", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>[-−]\s*)?[$£€]?\s*(?:"
    r"(?P<whole>\d+)\s+(?P<mixed_top>\d+)\s*/\s*(?P<mixed_bottom>\d+)"
    r"|(?P<top>\d[\d,]*(?:\.\d+)?)\s*/\s*(?P<bottom>\d[\d,]*(?:\.\d+)?)"
    r"|(?P<plain>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+))"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad)|\\?\$|\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_EXPLAINED = re.compile(r"\s\((?=[a-zA-Z])|,?\s(?:because|since)\s")
"""Start of an explanation after the answer, which may hold equations."""
_EQUALS = re.compile(r"=|\\approx|≈")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")


def extract(text: str, kind: AnswerKind, *, is_complete: bool = True) -> str | None:
    """Return the answer in a text, None if it holds no readable one.

    Args:
        is_complete: False for a text that was cut off: only an answer that it announces before its last line counts.
    """
    if not is_complete:
        text = text.rpartition("\n")[0]
        if last_boxed(text) is None and not _MARK.search(text):
            return None
    if kind == "choice":
        return _choice(text)
    found = last_boxed(text)
    if found is None and _MARK.search(text):
        after = _MARK.split(text)[-1]
        found = _HOPE.sub("", after).strip().split("\n")[0].strip()
    if found is None or not found.strip(" .:"):
        numbers = list(_NUMBER.finditer(_plain(text) if kind == "number" else text))
        return numbers[-1].group().strip() if numbers else None
    found = found.strip()
    if kind == "number" and number_of(found) is None:
        return None
    return found.rstrip(".").strip()


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, with balanced braces; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0 or (opened := text.find("{", start)) < 0:
        return None
    depth = 0
    for end in range(opened, len(text)):
        if text[end] == "{":
            depth += 1
        elif text[end] == "}":
            depth -= 1
            if depth == 0:
                return text[opened + 1 : end]
    return None


def _choice(text: str) -> str | None:
    """Return the letter after "the answer is", else the one in a box: a box often holds the value instead."""
    parts = _MARK.split(text)
    tail = parts[-1] if len(parts) > 1 else last_boxed(text) or text
    patterns = (r"\(\s*([A-J])\s*\)", r"(?:^|[\s$*{])([A-J])(?=[\s.,:;)$*}]|$)")
    for pattern in patterns:
        found = re.findall(pattern, tail)
        if found:
            return str(found[0] if tail is not text else found[-1])
    return None


def number_of(text: str) -> Fraction | None:
    """Return the number in an answer: the first one after the last equals sign, ignoring a following explanation.

    None without a number.
    """
    plain = _plain(text)
    claim = _EXPLAINED.split(plain)[0]
    *before, last = _EQUALS.split(claim if _NUMBER.search(claim) else plain)
    match = _NUMBER.search(last)
    if match is None and before:  # "8 = half of it"; an expression of several numbers without a result has no answer
        found = list(_NUMBER.finditer(before[-1]))
        match = found[0] if len(found) == 1 else None
    if match is None:
        return None
    try:
        value = _value(match)
    except (ZeroDivisionError, ValueError):
        return None
    return -value if match["sign"] else value


def _plain(text: str) -> str:
    """Return a text without LaTeX around its numbers, with fractions as a/b."""
    plain = _TEXT.sub(r" \1 ", text)
    plain = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", plain)
    return _DROPPED.sub("", plain).replace("{,}", ",").replace("\\%", "%").replace("{", " ").replace("}", " ")


def _value(match: re.Match[str]) -> Fraction:
    if match["whole"]:
        return Fraction(match["whole"]) + Fraction(int(match["mixed_top"]), int(match["mixed_bottom"]))
    if match["top"]:
        return Fraction(match["top"].replace(",", "")) / Fraction(match["bottom"].replace(",", ""))
    return Fraction(match["plain"].replace(",", ""))


def equal(answer: str | None, truth: str, kind: AnswerKind, *, rules: Rules = "strict") -> bool:
    """Return True if an extracted answer is correct."""
    if answer is None:
        return False
    if kind == "choice":
        return answer.strip().upper() == truth.strip().strip("()").upper()
    if kind == "number" or (_is_number(answer) and _is_number(truth)):
        found, correct = number_of(answer), number_of(truth)
        if found is not None and correct is not None and _same_number(found, correct, rules):
            return True
        if kind == "number":
            return False
    return _normal(answer) == _normal(truth) or _verified(answer, truth)


def _same_number(found: Fraction, correct: Fraction, rules: Rules) -> bool:
    """Compare two numbers, allowing rounding to four digits or more."""
    if abs(found - correct) <= Fraction(1, 10_000) * min(Fraction(1), abs(correct)):
        return True
    if rules == "strict":
        return False
    for scaled in (correct / 100, correct, correct * 100):
        if found == scaled or (scaled.denominator == 1 and round(float(found)) == scaled):
            return True
    return False


def _is_number(text: str) -> bool:
    """Return True if a text is a single number, apart from its sign, currency or percent."""
    plain = _DROPPED.sub("", _FRACTION.sub("1/2", text)).replace("\\%", "").replace("%", "").strip(" .{}")
    return _NUMBER.fullmatch(plain) is not None


def _normal(text: str) -> str:
    plain = _DROPPED.sub("", _TEXT.sub(r"\1", text)).replace("dfrac", "frac").replace("tfrac", "frac")
    return re.sub(r"\s+", "", plain).rstrip(".").lower()


def _verified(answer: str, truth: str) -> bool:
    try:
        from math_verify import verify
    except ImportError as error:
        raise TaskError.missing(
            "package math-verify", "answers other than plain numbers", "pip install math-verify"
        ) from error
    correct, found = _parsed(truth), _parsed(answer)
    return bool(correct and found and verify(list(correct), list(found)))


@cache
def _parsed(text: str) -> tuple[object, ...]:
    from math_verify import parse

    return tuple(parse(text if "$" in text else f"${text}$"))
