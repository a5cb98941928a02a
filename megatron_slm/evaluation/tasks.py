"""Tasks: JSON lines of questions and answers, in the published form of each data set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.data.preprocessing.inputs import expand_inputs
from megatron_slm.errors import TaskError
from megatron_slm.evaluation.answers import AnswerKind, last_boxed
from megatron_slm.evaluation.prompts import PromptName, with_choices


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its correct answer."""

    text: str
    answer: str
    kind: AnswerKind


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions that share a prompt."""

    name: str
    prompt: PromptName
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Fields of a data set's lines."""

    prompt: PromptName
    kind: AnswerKind
    question: tuple[tuple[str, ...], ...] = (("question",), ("problem",), ("input",))
    """Alternatives of fields that, joined, are the question; the first alternative present in a line applies."""
    answer: tuple[str, ...] = ("answer", "target")
    clean: Callable[[str], str] = str.strip


def _after_hashes(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def _without_brackets(answer: str) -> str:
    return re.sub(r"\(.*?\)", "", answer).strip()


def _boxed(solution: str) -> str:
    return last_boxed(solution) or solution.strip()


_WORDS: PromptName = "gsm8k"
_SVAMP, _ASDIV = (("Body", "Question"), ("question",)), (("body", "question"), ("question",))
FORMS = {
    "gsm8k": _Form(prompt=_WORDS, kind="number", clean=_after_hashes),
    "svamp": _Form(prompt=_WORDS, kind="number", question=_SVAMP, answer=("Answer", "answer")),
    "asdiv": _Form(prompt=_WORDS, kind="number", question=_ASDIV, clean=_without_brackets),
    "mawps": _Form(prompt=_WORDS, kind="number"),
    "tabmwp": _Form(prompt=_WORDS, kind="math", question=(("table", "question"), ("question",))),
    "math": _Form(prompt="math", kind="math", answer=("answer", "solution"), clean=_boxed),
    "mathqa": _Form(prompt="choices", kind="choice", answer=("correct", "answer")),
    "mmlu_stem": _Form(prompt="choices", kind="choice"),
    "sat_math": _Form(prompt="choices", kind="choice", answer=("answer", "Answer")),
}  # fmt: skip
"""Forms of the nine tasks in the paper's table 1."""


def read_task(text: str, *, limit: int | None = None) -> Task:
    """Read a task from `FORM=FILE` or `NAME:FORM=FILE`.

    Args:
        limit: largest number of questions; None for all.

    Raises:
        TaskError: the form is unknown, or a line lacks its fields.
        CorpusError: the file is missing or truncated.
    """
    label, separator, path = text.partition("=")
    name, _, form_name = label.partition(":")
    form = FORMS.get(form_name or name)
    if not separator or form is None:
        raise TaskError(
            "--task", text, f"be FORM=FILE or NAME:FORM=FILE, with a form of {', '.join(FORMS)}", "name a form"
        )
    questions: list[Question] = []
    for file in expand_inputs([path], "--task"):
        for number, line in enumerate(read_lines(file, "--task"), 1):
            if line.strip() and (limit is None or len(questions) < limit):
                questions.append(_question(line, form, f"{file}: line {number}"))
    if not questions:
        raise TaskError("--task", text, "hold at least one question", "use a file that is not empty")
    return Task(name=name, prompt=form.prompt, questions=tuple(questions))


def _question(line: bytes, form: _Form, place: str) -> Question:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        start = line[:40].decode(errors="replace")
        raise TaskError(place, start, f"be a JSON object ({error})", "correct the line") from error
    if not isinstance(record, dict):
        raise TaskError(place, type(record).__name__, "be a JSON object", "correct the line")
    fields = next((names for names in form.question if all(record.get(name) for name in names)), None)
    if fields is None:
        wanted = " or ".join(" + ".join(names) for names in form.question)
        raise TaskError(place, sorted(record), f"have a question ({wanted})", "rename the fields")
    answer = next((record[name] for name in form.answer if record.get(name) not in (None, "")), None)
    if answer is None:
        wanted = " or ".join(form.answer)
        raise TaskError(place, sorted(record), f"have an answer ({wanted})", "rename the fields")
    text = " ".join(str(record[name]).strip() for name in fields)
    options = record.get("choices") or record.get("options")
    if form.kind == "choice":
        if not options:
            raise TaskError(place, sorted(record), "have choices (a list, an object, or text)", "add the choices")
        return Question(text=with_choices(text, _options(options)), answer=_letter(str(answer)), kind="choice")
    if options:
        text += f" Please select from the following options: {options}"
    clean = form.clean(str(answer))
    if not clean:
        raise TaskError(f"{place}: answer", answer, "hold an answer", "correct the line")
    return Question(text=text, answer=clean, kind=form.kind)


def _options(options: Any) -> str:
    if isinstance(options, dict):
        return ", ".join(f"({key}) {value}" for key, value in options.items())
    if isinstance(options, list):
        return ", ".join(f"({chr(ord('A') + i)}) {value}" for i, value in enumerate(options))
    return str(options)


def _letter(answer: str) -> str:
    """Return a choice as a capital letter; MMLU numbers choices from 0, MathQA has lower-case letters."""
    plain = answer.strip().strip("().")
    return chr(ord("A") + int(plain)) if plain.isdigit() else plain.upper()
