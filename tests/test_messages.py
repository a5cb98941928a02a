"""The wording of errors, docstrings and messages, over the whole source: the field's plain English, one template."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import megatron_slm
from megatron_slm import errors
from megatron_slm.errors import ConfigError, SlmError

PACKAGE = Path(megatron_slm.__file__).parent
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
ROOMS += sorted(path.name for path in PACKAGE.glob("*.py"))
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SlmError)}

INFINITIVES = set(
    "be have hold match name equal fit divide contain exist lie start end agree cover belong come follow keep use "
    "leave allow support differ reach read open load parse stay map list fill take run give carry "
    "precede share return respond answer finish arrive receive load".split()
)
"""How a rule may begin; extend it with other bare infinitives."""

BANNED = {
    "says": r"\b(says?|said)\b",
    "goes on": r"\b(goes|go|went|going) on\b",
    "stands": r"\b(stands?|stood)\b",
    "is given": r"\b(is|are|was|were) given\b",
}
"""Phrases that hide a verb of the field: log, report, resume, continue, hold, pass."""

OPENINGS = re.compile(r"(What|Which|Where|How|Whether|Why|As|See) ")
"""How no docstring begins: it opens with a verb or a noun phrase."""


class Message(NamedTuple):
    """The literal texts of one error in the source; `{}` stands for what is filled in at run time."""

    where: str
    kind: str
    field: str | None
    rule: str | None
    fix: str | None


def _files(room: str) -> list[Path]:
    path = PACKAGE / room
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def _texts(node: ast.expr | None) -> list[str]:
    """The texts an expression can have, with {} for each part known only at run time."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left) or ["{}"] for b in _texts(node.right) or ["{}"]]
    return []


def _helpers() -> dict[str, list[str]]:
    """Functions that pass a rule on to an error, by name: their parameters in order."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                if "rule" in names + [a.arg for a in node.args.kwonlyargs] and node.name != "__init__":
                    found[node.name] = names
    return found


HELPERS = _helpers()


def _messages(path: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = (
            function.id
            if isinstance(function, ast.Name)
            else function.attr
            if isinstance(function, ast.Attribute)
            else ""
        )
        if name in ERRORS and name != "SlmError":
            parameters = ["field", "value", "rule", "fix"]
        elif name == "missing":
            parameters = ["field", "required_by", "fix"]
        elif name in HELPERS:
            parameters = HELPERS[name]
        else:
            continue
        given = dict(zip(parameters, node.args, strict=False)) | {k.arg: k.value for k in node.keywords if k.arg}
        where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
        fields = [*_texts(given.get("field")), *_texts(given.get("flag"))] or [None]
        for field in fields:
            for rule in _texts(given.get("rule")) or [None]:
                for fix in _texts(given.get("fix")) or [None]:
                    yield Message(where, name, field, rule, fix)


@pytest.mark.parametrize("room", ROOMS)
def test_rules_are_bare_infinitives(room: str) -> None:
    wrong = []
    for message in {m for path in _files(room) for m in _messages(path)}:
        if message.rule is None or message.rule.startswith(("{}", "required ")):
            continue
        if message.rule.split()[0].rstrip(",") not in INFINITIVES | {"not", "neither", "either", "only", "both"}:
            wrong.append(f"{message.where}: must {message.rule}")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("room", ROOMS)
def test_fields_are_named_as_typed(room: str) -> None:
    """No Python identifier names an input: `--micro-batch-size`, not `micro_batch_size`."""
    found = {m for path in _files(room) for m in _messages(path) if m.field}
    wrong = [f"{m.where}: {m.field}" for m in found if re.fullmatch(r"[a-z]+(_[a-z]+)+", str(m.field))]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("room", ROOMS)
def test_texts_are_plain(room: str) -> None:
    """No message, help text or docstring hides its verb."""
    wrong = []
    for path in _files(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                for name, pattern in BANNED.items():
                    if re.search(pattern, node.value):
                        wrong.append(
                            f"{path.relative_to(PACKAGE)}:{node.lineno}: {name!r} in {node.value.strip()[:90]!r}"
                        )
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_open_with_a_verb_or_a_noun(room: str) -> None:
    wrong = []
    for path in _files(room):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if not isinstance(body, list):
                continue
            for statement in body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str) and OPENINGS.match(text.strip()):
                        wrong.append(f"{path.relative_to(PACKAGE)}:{statement.lineno}: {text.strip()[:80]!r}")
    assert not wrong, "\n".join(sorted(wrong))


def test_the_template() -> None:
    assert str(ConfigError("--lr", -1, "be positive", "raise it")) == "--lr is -1: must be positive. Fix: raise it"
    missing = ConfigError.missing("--reference-load", "--objective slm", "name the reference")
    assert str(missing) == "--reference-load is missing: required by --objective slm. Fix: name the reference"
    assert (
        str(ConfigError("--lr", None, "be positive", "raise it")) == "--lr is missing: must be positive. Fix: raise it"
    )
