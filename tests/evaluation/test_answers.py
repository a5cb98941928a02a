"""Answers are found and compared as a person would."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from megatron_slm.evaluation.answers import AnswerKind, equal, extract, last_boxed, number_of

NUMBERS = [
    ("The answer is 8.", "8"),
    ("So 5 + 3 = 8 and 2 x 8 = 16. The answer is 16 apples.", "16"),
    ("The answer is $1,234.50.", "1234.5"),
    ("The answer is \\$18.", "18"),
    ("The answer is €20 per day.", "20"),
    ("The answer is -5 degrees.", "-5"),
    ("The answer is −5.", "-5"),
    ("The answer is 50%.", "50"),
    ("The answer is 50\\%.", "50"),
    ("The answer is 1,000,000.", "1000000"),
    ("The answer is 3/4.", "0.75"),
    ("The answer is 1,000/4 metres.", "250"),
    ("The answer is 1 1/2 hours.", "1.5"),
    ("The answer is 10 + 8 = 18 dollars.", "18"),
    ("The answer is: 7", "7"),
    ("The answer is .5", "1/2"),
    ("The answer is 6.0", "6"),
    ("The final answer is $16$. I hope it is correct.", "16"),
    ("x\n#### 72", "72"),
    ("There are 5. The answer is 6. The answer is 7.", "7"),
    ("the total is 40 + 2 = 42", "42"),
    ("He pays 3 dollars, then 4.", "4"),
    ("So it is \\boxed{42}.", "42"),
    ("\\boxed{\\frac{3}{4}}", "0.75"),
    ("\\boxed{\\dfrac12}", "1/2"),
    ("$\\boxed{12\\text{ cm}}$", "12"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{1{,}234}", "1234"),
    ("The answer is 1e3.", "1000"),
    ("The answer is **$1,200** (as 2 + 2 = 4).", "1200"),
    ("The answer is 8 = half of it.", "8"),
    ("The answer is 42, because 6 * 7 = 42 and 1 = 1.", "42"),
    ("So in total it is 2\\frac{1}{2}.", "2.5"),
    ("**Answer:** \\(12\\)", "12"),
    ("The answer is -$5.", "-5"),
    ("The answer is (5).", "5"),
    ("\\boxed{1\\,250\\,\\mathrm{m}}", "1250"),
]


@pytest.mark.parametrize(("text", "truth"), NUMBERS)
def test_numbers(text: str, truth: str) -> None:
    answer = extract(text, "number")
    assert equal(answer, truth, "number"), answer
    assert not equal(answer, str(Fraction(truth) + 1), "number")
    assert not equal(answer, str(Fraction(truth) * 100), "number")


@pytest.mark.parametrize("text", ["", "no idea", "The answer is unknown.", "\\boxed{}", "The answer is 5 + 3 = x."])
def test_what_cannot_be_read_is_none_and_wrong(text: str) -> None:
    assert extract(text, "number") is None
    assert not equal(None, "5", "number")


def test_ways_to_write_random_numbers() -> None:
    """Units, commas, currencies, fractions, boxes: all are recognised, and a neighbour never is."""
    rng = random.Random(0)
    for _ in range(3000):
        value = Fraction(rng.choice([rng.randint(-50, 50), rng.randint(0, 10**7), Fraction(rng.randint(1, 9999), 100)]))
        whole = value.denominator == 1
        plain = str(value.numerator) if whole else f"{float(value):.2f}"
        shown = rng.choice([plain, f"{float(value):,.2f}", f"{value.numerator:,}" if whole else plain])
        number = rng.choice([shown, f"${shown}", f"{shown} dollars", f"{shown}%", f"£{shown}", f"{shown} km/h"])
        if value > 0:
            number = rng.choice([number, f"\\frac{{{value.numerator}}}{{{value.denominator}}}"])
        text = rng.choice(["So 3 x 7 = 21. The answer is {}.", "Then \\boxed{{{}}}", "10 - 1 = 9\n#### {}"]).format(
            number
        )
        answer = extract(text, "number")
        assert equal(answer, plain, "number"), (text, answer, plain)
        assert not equal(answer, str(value + 1), "number"), text


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("The answer is (B).", "B", True),
        ("Final Answer: The final answer is (C). I hope it is correct.", "C", True),
        ("A is wrong, (B) too. The answer is D", "D", True),
        ("We choose \\boxed{E}", "E", True),
        ("The answer is (b", "B", False),
        ("The answer is (A).", "B", False),
        ("A car drives. So it must be (D)", "D", True),
    ],
)
def test_choices(text: str, truth: str, right: bool) -> None:
    assert equal(extract(text, "choice"), truth, "choice") is right


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\left[2,5\\right)", "[2,5)", True),
        ("(2,5)", "[2,5)", False),
        ("x^2 + 1", "1+x^2", True),
        ("x^2 + 1", "x^2 - 1", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("\\frac{\\pi}{2}", "0.5\\pi", True),
        ("\\text{even}", "even", True),
        ("\\text{odd}", "even", False),
        ("90^\\circ", "90", True),
        ("(1, \\frac{9}{2})", "(1,4.5)", True),
        ("1{,}000", "1000", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
    ],
)
def test_mathematics(answer: str, truth: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert equal(extract(f"Thus $\\boxed{{{answer}}}$.", "math"), truth, "math") is right


def test_boxes_are_balanced() -> None:
    assert last_boxed("\\boxed{1} and \\boxed{\\frac{a}{b}} end") == "\\frac{a}{b}"
    assert last_boxed("\\boxed{cut off") is None
    assert last_boxed("none") is None


def test_the_papers_rules_take_more_for_right() -> None:
    """A hundredth, a hundredfold, and what rounds to a whole number: as the authors' harness does."""
    for answer, truth in (("50", "0.5"), ("0.5", "50"), ("7.4", "7")):
        assert equal(answer, truth, "number", rules="paper")
        assert not equal(answer, truth, "number")
    assert not equal("8", "7", "number", rules="paper")


def test_signs_count() -> None:
    assert not equal("-5", "5", "number")
    assert not equal("5", "-5", "number")
    assert number_of("-3/4") == Fraction(-3, 4)


def test_division_by_zero_is_no_number() -> None:
    assert number_of("1/0") is None


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("so she sold 48/2 = 24, and then - 400000", "number", None),
        ("The answer is 5.\nThen 6 + 7 = 1", "number", "5"),
        ("The answer is 12", "number", None),
        ("\\boxed{x}\nand so on", "math", "x"),
        ("Of (A) and (B) it is\n(B) or (C", "choice", None),
        ("The answer is (B)\nQuestion", "choice", "B"),
    ],
)
def test_an_answer_that_is_cut_off_is_none(text: str, kind: AnswerKind, answer: str | None) -> None:
    assert extract(text, kind, is_complete=False) == answer
