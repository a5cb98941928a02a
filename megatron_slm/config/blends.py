"""Parses blends of corpora (Megatron-LM's three syntaxes) and phases of blends."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_slm.errors import ConfigError

_NAMED = re.compile(r"([\w.+-]+)=(.+)")


@dataclass(frozen=True)
class NamedPrefix:
    """A corpus and its name in metrics and messages."""

    name: str
    prefix: str
    """Path without `.bin` and `.idx`."""


@dataclass(frozen=True)
class Blend:
    """Corpora sampled together."""

    corpora: tuple[NamedPrefix, ...]
    weights: tuple[float, ...] | None
    """Sampling weights, not normalized; None: in proportion to the corpora's sizes."""


@dataclass(frozen=True)
class BlendPhase:
    """A blend used from a step on."""

    first_step: int
    """Number of steps before it."""
    blend: Blend


def named_prefix(text: str) -> NamedPrefix:
    """Parse `NAME=PREFIX`, or `PREFIX`, whose name is the last component of its path.

    A name has no slash, so a prefix such as `/data/date=2024/web` stays a prefix.
    """
    named = _NAMED.fullmatch(text)
    if named and "/" not in named[1]:
        return NamedPrefix(named[1], named[2])
    return NamedPrefix(text.rstrip("/").rpartition("/")[2], text)


def parse_blend(words: Sequence[str], flag: str) -> Blend:
    """Parse `PREFIX`, `PREFIX PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`, as Megatron-LM does.

    Raises:
        ConfigError: no corpus, a corpus named twice, or weights that are not finite and positive with a finite sum.
    """
    words = [word.strip() for word in words]
    numbers = [_number(word) for word in words[::2]]
    weights = None
    prefixes = words
    if words and len(words) % 2 == 0 and all(number is not None for number in numbers):
        weights, prefixes = tuple(number for number in numbers if number is not None), words[1::2]
    elif len(words) > 1 and any(number is not None for number in numbers):
        raise ConfigError(
            flag, " ".join(words), "have a weight for every corpus or for none", "write WEIGHT PREFIX pairs"
        )
    corpora = tuple(named_prefix(word) for word in prefixes)
    if not corpora:
        raise ConfigError(flag, list(words), "name a corpus", "use the PREFIX of PREFIX.bin and PREFIX.idx")
    for weight, corpus in zip(weights or [1.0] * len(corpora), corpora, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            rule = f"be a finite number above 0 (weight of {corpus.prefix})"
            raise ConfigError(flag, weight, rule, "remove the corpus, or use a positive weight")
    if weights is not None and not math.isfinite(sum(weights)):
        raise ConfigError(flag, list(weights), "have a finite sum", "use smaller weights")
    check_names(corpora, flag)
    return Blend(corpora, weights)


def parse_phase(text: str) -> BlendPhase:
    """Parse `STEP: BLEND`, the blend's arguments separated by spaces.

    Raises:
        ConfigError: malformed text.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:(.*)", text, re.DOTALL)
    if found is None or int(found[1]) == 0:
        raise ConfigError(
            "--data-phases",
            text,
            "have the form STEP: BLEND with a step above 0",
            "write e.g. '2000: 0.3 web 0.7 books'",
        )
    return BlendPhase(int(found[1]), parse_blend(found[2].split(), f"--data-phases at step {found[1]}"))


def parse_phases(texts: Iterable[str]) -> tuple[BlendPhase, ...]:
    """Parse --data-phases.

    Raises:
        ConfigError: a phase is malformed, or the steps do not increase.
    """
    phases = tuple(parse_phase(text) for text in texts)
    steps = [phase.first_step for phase in phases]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ConfigError("--data-phases", steps, "have increasing steps", "write the phases in order of their steps")
    return phases


def check_names(corpora: Iterable[NamedPrefix], flag: str) -> None:
    """Check that every corpus is listed once and has its own name.

    Raises:
        ConfigError: duplicate corpus or name.
    """
    by_name: dict[str, str] = {}
    for corpus in corpora:
        if corpus.name in by_name:
            same = by_name[corpus.name] == corpus.prefix
            rule = "be listed once" if same else f"have its own name ({corpus.name} is taken)"
            raise ConfigError(flag, corpus.prefix, rule, "raise its weight instead" if same else "write NAME=PREFIX")
        by_name[corpus.name] = corpus.prefix


def is_number(word: str) -> bool:
    """Return True if an argument of a blend is a weight."""
    return _number(word) is not None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
