"""The quickstart's corpora are reproducible, disjoint and right."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
FILES = ("curated_train", "curated_heldout", "noisy_train", "noisy_heldout")


def load_example(name: str) -> ModuleType:
    """Import a script of the quickstart by its path: `examples` is not a package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_corpora = load_example("make_corpora")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of the four files."""
    folder: Path = tmp_path_factory.mktemp("corpora")
    make_corpora.make_corpora(folder, 7, curated_documents=600, noisy_documents=400, heldout_documents=80)
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(folder: Path, name: str) -> list[str]:
    """The texts of one file."""
    return [record["text"] for record in records(folder, name)]


# Corpora.


def test_same_seed_gives_the_same_bytes(corpora: Path, tmp_path: Path) -> None:
    """Another run with the same arguments writes the same files; another seed does not."""
    sizes = {"curated_documents": 600, "noisy_documents": 400, "heldout_documents": 80}
    make_corpora.make_corpora(tmp_path / "again", 7, **sizes)
    make_corpora.make_corpora(tmp_path / "other", 8, **sizes)
    for name in FILES:
        written = (corpora / f"{name}.jsonl").read_bytes()
        assert written == (tmp_path / "again" / f"{name}.jsonl").read_bytes()
        assert written != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_held_out_documents_are_in_no_training_file(corpora: Path) -> None:
    """Also not inside a noisy page, where a problem is followed by more text."""
    held_out = set(texts(corpora, "curated_heldout"))
    assert held_out.isdisjoint(texts(corpora, "curated_train"))
    noisy = texts(corpora, "noisy_train")
    assert set(texts(corpora, "noisy_heldout")).isdisjoint(noisy)
    assert not [problem for problem in held_out if any(problem in page for page in noisy)]


def test_forbidden_problems_are_drawn_again() -> None:
    """A problem of the held-out set that the stream would give is replaced by another."""
    first = "".join(make_corpora.make_problem(make_corpora.random.Random(3), frozenset()))
    second = "".join(make_corpora.make_problem(make_corpora.random.Random(3), frozenset([first])))
    assert first != second


def evaluate(terms: str) -> float:
    """The value of `a op b op c` with one precedence level, as the problems write it."""
    first, *rest = re.findall(r"[+\-x/]|\d+", terms)
    value = float(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        value = OPERATORS[sign](value, number)
    return value


def test_every_equation_of_the_curated_corpus_holds(corpora: Path) -> None:
    """Each document has equations, all right; its answer is the last result of its working."""
    for text in texts(corpora, "curated_train"):
        equations = re.findall(r"(\d+(?: [+\-x/] \d+)+) = (\d+)", text)
        assert equations, text
        for terms, result in equations:
            assert evaluate(terms) == int(result), text
        answers = re.findall(r"^Answer: (\d+)$", text, flags=re.MULTILINE)
        assert answers == [equations[-1][1]], text
        assert 100 <= len(text) <= 400


def test_columns_end_in_the_digits_of_the_answer(corpora: Path) -> None:
    """The digits written column by column make up the sum."""
    sums = [text for text in texts(corpora, "curated_train") if " plus " in text]
    assert sums
    for text in sums:
        written = re.findall(r"write (\d)", text)
        assert f"Answer: {''.join(reversed(written))}\n" in text


def test_spans_cover_held_out_pages_and_every_kind_occurs(corpora: Path) -> None:
    """Spans add up to the text, name known kinds, and are in no file that is trained on."""
    kinds = set()
    for record in records(corpora, "noisy_heldout"):
        assert sum(length for _, length in record["spans"]) == len(record["text"])
        kinds |= {kind for kind, _ in record["spans"]}
    assert kinds == set(make_corpora.KINDS)
    assert all(set(record) == {"text"} for record in records(corpora, "noisy_train"))


def test_only_changed_characters_are_called_corrupted() -> None:
    """Without its corrupted digits, a line is the clean line without the digits at the same places."""
    rng = make_corpora.random.Random(0)
    line = "Add them: 140 + 21 = 161."
    changed = 0
    for _ in range(300):
        segments = make_corpora.corrupt_line(rng, line)
        text = "".join(segment for _, segment in segments)
        assert text.endswith("\n")
        marks = "".join(kind[0] * len(segment) for kind, segment in segments)
        if len(text) == len(line) + 1:
            differing = "".join("c" if a != b else "a" for a, b in zip(text, line + "\n", strict=True))
            assert marks == differing
        changed += "c" in marks
    assert changed > 250


def test_the_table_names_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes the files and prints documents, characters and shares of each."""
    command = f"make_corpora.py --output {tmp_path} --seed 1 --curated-documents 20 --noisy-documents 10"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--heldout-documents", "5"])
    make_corpora.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [
        ["curated_train", "20"],
        ["curated_heldout", "5"],
        ["noisy_train", "10"],
        ["noisy_heldout", "5"],
    ]
