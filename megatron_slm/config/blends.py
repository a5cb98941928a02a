"""Blends of corpora as they are written on the command line: Megatron's three syntaxes, and phases of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from megatron_slm.errors import ConfigError

_NAMED = re.compile(r"([\w.+-]+)=(.+)")


@dataclass(frozen=True)
class NamedPrefix:
    """A corpus and what it is called in metrics and messages."""

    name: str
    prefix: str
    """Path without `.bin` and `.idx`."""


@dataclass(frozen=True)
class Blend:
    """Corpora that are read together."""

    corpora: tuple[NamedPrefix, ...]
    weights: tuple[float, ...] | None
    """How often each is drawn, not normalised; None: in proportion to their sizes."""


@dataclass(frozen=True)
class BlendPhase:
    """A blend that holds from a step on."""

    first_step: int
    """Steps done before it."""
    blend: Blend


def named_prefix(text: str) -> NamedPrefix:
    """`NAME=PREFIX` or `PREFIX`, whose name is its last part.

    A name has no slash, so a prefix such as `/data/date=2024/web` stays a prefix.
    """
    named = _NAMED.fullmatch(text)
    if named and "/" not in named[1]:
        return NamedPrefix(named[1], named[2])
    return NamedPrefix(text.rstrip("/").rpartition("/")[2], text)


def parse_blend(words: Sequence[str], flag: str) -> Blend:
    """`PREFIX`, `PREFIX PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`, as Megatron reads them.

    Raises:
        ConfigError: there is no corpus, one is named twice, a weight is not a number above 0, or their sum is none.
    """
    words = [word.strip() for word in words]
    numbers = [_number(word) for word in words[::2]]
    weights = None
    prefixes = words
    if words and len(words) % 2 == 0 and all(number is not None for number in numbers):
        weights, prefixes = tuple(number for number in numbers if number is not None), words[1::2]
    elif len(words) > 1 and any(number is not None for number in numbers):
        _refuse(flag, " ".join(words), "gives a weight to every corpus or to none", "write WEIGHT PREFIX pairs")
    corpora = tuple(named_prefix(word) for word in prefixes)
    if not corpora:
        _refuse(flag, list(words), "names a corpus", "give the PREFIX of PREFIX.bin and PREFIX.idx")
    for weight, corpus in zip(weights or [1.0] * len(corpora), corpora, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            rule = f"is a finite number above 0 (the weight of {corpus.prefix})"
            _refuse(flag, weight, rule, "leave the corpus out, or give it a share")
    if weights is not None and not math.isfinite(sum(weights)):
        _refuse(flag, list(weights), "has weights with a finite sum", "divide them all by one number")
    check_names(corpora, flag)
    return Blend(corpora, weights)


def parse_phase(text: str) -> BlendPhase:
    """`STEP: BLEND`, with the blend's words between spaces.

    Raises:
        ConfigError: it is not that.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:(.*)", text, re.DOTALL)
    if found is None or int(found[1]) == 0:
        _refuse("--data-phases", text, "is STEP: BLEND with a step above 0", "for example '2000: 0.3 web 0.7 books'")
    return BlendPhase(int(found[1]), parse_blend(found[2].split(), f"--data-phases at step {found[1]}"))


def parse_phases(texts: Iterable[str]) -> tuple[BlendPhase, ...]:
    """All of --data-phases.

    Raises:
        ConfigError: one cannot be read, or the steps do not rise.
    """
    phases = tuple(parse_phase(text) for text in texts)
    steps = [phase.first_step for phase in phases]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        _refuse("--data-phases", steps, "have steps that rise", "write the phases in the order they come")
    return phases


def check_names(corpora: Iterable[NamedPrefix], flag: str) -> None:
    """Refuse a corpus that is named twice, and two corpora of one name.

    Raises:
        ConfigError: there is such a pair.
    """
    by_name: dict[str, str] = {}
    for corpus in corpora:
        if corpus.name in by_name:
            same = by_name[corpus.name] == corpus.prefix
            rule = "names each corpus once" if same else f"has a name of its own ({corpus.name} is taken)"
            _refuse(flag, corpus.prefix, rule, "raise its weight instead" if same else "write NAME=PREFIX")
        by_name[corpus.name] = corpus.prefix


def is_number(word: str) -> bool:
    """Whether a word of a blend is a weight."""
    return _number(word) is not None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _refuse(flag: str, value: object, rule: str, fix: str) -> NoReturn:
    raise ConfigError(flag, value, rule, fix)
