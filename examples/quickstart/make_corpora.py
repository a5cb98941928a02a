"""Make the quickstart's corpora: clean worked arithmetic, and a noisy "web" that contains such arithmetic.

The *curated* corpus trains the reference: short worked problems, all results correct. The *noisy* corpus trains
the two models compared. Its documents look like crawled pages: the same kind of problems (from another random
stream), problems with corrupted lines, boilerplate, prose, and high-entropy noise (hashes, ids, random URLs)
that no model can predict. `--seed` determines all of it.

Every file holds one JSON object per line, with the key `text`. Those of `noisy_heldout.jsonl` also have
`spans`, a list of `[kind, characters]` that labels the parts of the text; only the report reads it.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

CURATED_DOCUMENTS = 10_000
NOISY_DOCUMENTS = 6_500
HELDOUT_DOCUMENTS = 300

KINDS = ("arithmetic", "corrupted", "boilerplate", "prose", "noise")

NAMES = "Ada Ben Carla Dan Emma Felix Grace Hugo Iris Jonas Kira Leo Mina Noah Olga Paul Rosa Sam Tara Yusuf"
ITEMS = "apples books cards coins eggs flowers marbles pens shells stamps stickers tickets"
BOXES = "bags boxes baskets crates jars packs rows shelves trays"
CITIES = "Basel Cork Delft Ghent Leeds Lund Porto Riga Turin York"
TOPICS = "bicycle lanes,local taxes,school meals,the harbour,the new bridge,the old theatre,the water supply"
SPEAKERS = "the mayor,a spokesman,the committee,the museum,a neighbour,the council"
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday"
MENU = "Home Shop Blog About Contact Login Help Archive Forum Gallery Jobs News Press Search"
SITES = "mathpond homework-hub sumtrail daily-drill numberbarn"
PLACES = ("Ones", "Tens", "Hundreds")
HEXADECIMAL = "0123456789abcdef"

Segment = tuple[str, str]
"""A kind of `KINDS` and a text of that kind."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document, as a sequence of segments."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """Joined text of the segments."""
        return "".join(text for _, text in self.segments)

    def to_json(self, *, with_spans: bool) -> str:
        """Return the document as a line of a JSON-lines file, without the line break."""
        spans = {"spans": [[kind, len(text)] for kind, text in self.segments]} if with_spans else {}
        return json.dumps({"text": self.text, **spans}, ensure_ascii=True)


# Worked arithmetic: every template returns the lines of one problem.


def _buying(rng: random.Random) -> list[str]:
    name, item = _pick(rng, NAMES), _pick(rng, ITEMS)
    have, more, given = rng.randint(11, 60), rng.randint(5, 39), rng.randint(2, 15)
    total, friend = have + more, _other(rng, name)
    return [
        f"Question: {name} has {have} {item}. {name} buys {more} more and gives {given} to {friend}. "
        f"How many {item} does {name} have now?",
        f"After buying, {name} has {have} + {more} = {total} {item}.",
        f"After giving, {name} has {total} - {given} = {total - given} {item}.",
        f"Answer: {total - given}",
    ]


def _boxes(rng: random.Random) -> list[str]:
    name, item, box = _pick(rng, NAMES), _pick(rng, ITEMS), _pick(rng, BOXES)
    count, each, loose = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 20)
    packed = count * each
    return [
        f"Question: {name} packs {item} in {count} {box} of {each} and keeps {loose} more. How many is that?",
        f"In the {box}: {count} x {each} = {packed} {item}.",
        f"Together: {packed} + {loose} = {packed + loose} {item}.",
        f"Answer: {packed + loose}",
    ]


def _sharing(rng: random.Random) -> list[str]:
    first = _pick(rng, NAMES)
    second, item = _other(rng, first), _pick(rng, ITEMS)
    friends, share = rng.randint(2, 9), rng.randint(2, 12)
    total, extra = friends * share, rng.randint(1, min(15, friends * share - 1))
    return [
        f"Question: {first} has {total - extra} {item} and {second} has {extra}. "
        f"They share them equally among {friends} friends. How many {item} does each friend get?",
        f"Together they have {total - extra} + {extra} = {total} {item}.",
        f"Each friend gets {total} / {friends} = {share} {item}.",
        f"Answer: {share}",
    ]


def _addition(rng: random.Random) -> list[str]:
    left, right = rng.randint(100, 899), rng.randint(100, 899)
    lines, carry = [f"Question: Work out {left} plus {right} in columns."], 0
    for place, name in enumerate(PLACES):
        a, b = left // 10**place % 10, right // 10**place % 10
        total, terms = a + b + carry, f"{a} + {b} + {carry}" if carry else f"{a} + {b}"
        carry = total // 10
        step = f"write {total % 10}, carry {carry}" if carry else f"write {total}"
        lines.append(f"{name}: {terms} = {total}, {step}.")
    if carry:
        lines.append(f"Thousands: write {carry}.")
    return [*lines, f"So {left} + {right} = {left + right}.", f"Answer: {left + right}"]


def _subtraction(rng: random.Random) -> list[str]:
    right = rng.randint(100, 799)
    left = rng.randint(right + 10, 999)
    lines, borrow = [f"Question: Work out {left} minus {right} in columns."], 0
    for place, name in enumerate(PLACES):
        a, b = left // 10**place % 10 - borrow, right // 10**place % 10
        borrow = int(a < b)
        step = f"borrow, {a + 10} - {b} = {a + 10 - b}" if borrow else f"{a} - {b} = {a - b}"
        lines.append(f"{name}: {step}.")
    return [*lines, f"So {left} - {right} = {left - right}.", f"Answer: {left - right}"]


def _multiplication(rng: random.Random) -> list[str]:
    factor, tens, ones = rng.randint(3, 9), rng.randint(1, 9) * 10, rng.randint(1, 9)
    high, low, number = factor * tens, factor * ones, tens + ones
    return [
        f"Question: What is {factor} times {number}?",
        f"Split {number} into {tens} + {ones} = {number}.",
        f"First {factor} x {tens} = {high}, then {factor} x {ones} = {low}.",
        f"Add them: {high} + {low} = {high + low}.",
        f"Answer: {high + low}",
    ]


def _pick(rng: random.Random, words: str, separator: str = " ") -> str:
    return rng.choice(words.split(separator))


def _other(rng: random.Random, name: str) -> str:
    return rng.choice([candidate for candidate in NAMES.split() if candidate != name])


Template = Callable[[random.Random], list[str]]
TEMPLATES: tuple[Template, ...] = (_buying, _boxes, _sharing, _addition, _subtraction, _multiplication)


def make_problem(rng: random.Random, forbidden: frozenset[str]) -> list[str]:
    """Return the lines of a clean problem whose text is not in `forbidden`, with line breaks."""
    while True:
        lines = [line + "\n" for line in rng.choice(TEMPLATES)(rng)]
        if "".join(lines) not in forbidden:
            return lines


# Noise of the web.


def corrupt_line(rng: random.Random, line: str) -> list[Segment]:
    """Return a line with a wrong result (most often), swapped digits, garbage characters, or its end cut off.

    Only the changed characters are `corrupted`; after a cut, the line break is.
    """
    way = rng.choices(("wrong", "swap", "garbage", "cut"), weights=(6, 1, 2, 1))[0]
    digits = [place for place, character in enumerate(line) if character.isdigit()]
    characters = [(character, False) for character in line]
    if way == "wrong" and digits:
        start = max(line.rfind("="), line.rfind(":"))
        for place in [place for place in digits if place > start] or digits[-1:]:
            digit = rng.choice(string.digits)
            characters[place] = digit, digit != line[place]
    elif way == "swap" and len(digits) > 1:
        first, second = rng.sample(digits, 2)
        changed = line[first] != line[second]
        characters[first], characters[second] = (line[second], changed), (line[first], changed)
    elif way == "cut":
        characters = characters[: rng.randint(3, max(4, len(line) * 2 // 3))]
    else:
        for _ in range(rng.randint(2, 5)):
            characters.insert(rng.randrange(len(characters) + 1), (rng.choice("#$%&*@^~|<>{}?"), True))
    runs = groupby([*characters, ("\n", way == "cut")], key=lambda pair: pair[1])
    return [("corrupted" if changed else "arithmetic", "".join(c for c, _ in run)) for changed, run in runs]


def _token(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def noise_line(rng: random.Random) -> str:
    """Return a line of mostly random characters: a hash, a tracking id, a URL, a key, or a time stamp."""
    letters = string.ascii_letters + string.digits
    day = f"20{rng.randint(10, 24)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}"
    page = f"{_pick(rng, SITES)}.example/p/{_token(rng, letters, 14)}"
    lines = [
        f"etag: {_token(rng, HEXADECIMAL, 32)}",
        f"https://{page}?id={_token(rng, string.digits, 12)}",
        f"_ga=GA1.{_token(rng, string.digits, 10)}.{_token(rng, string.digits, 10)}",
        f"session {_token(rng, letters, 24)}",
        f"{day}T{time}Z {_token(rng, HEXADECIMAL, 16)}",
    ]
    return rng.choice(lines) + "\n"


def boilerplate_line(rng: random.Random) -> str:
    """Return a line found on every page of a site: a cookie banner, a menu, a copyright note, a newsletter."""
    site = _pick(rng, SITES)
    lines = [
        "We use cookies to improve your experience. Accept all | Settings | Reject",
        " | ".join(rng.sample(MENU.split(), rng.randint(4, 7))),
        f"Copyright (c) {rng.randint(2008, 2024)} {site}.example. All rights reserved.",
        f"Share this page: Mail | Print | Link ({rng.randint(0, 999)} views)",
        f"Sign up to the {site} newsletter and never miss a post!",
    ]
    return rng.choice(lines) + "\n"


def prose_line(rng: random.Random) -> str:
    """Return one to three sentences of local news, unrelated to arithmetic."""
    sentences = []
    for _ in range(rng.randint(1, 3)):
        speaker, city, topic = _pick(rng, SPEAKERS, ","), _pick(rng, CITIES), _pick(rng, TOPICS, ",")
        forms = [
            f"On {_pick(rng, WEEKDAYS)} {speaker} of {city} spoke about {topic}.",
            f"In {city}, {speaker} said that {topic} would have to wait until spring.",
            f"Visitors from {city} asked {speaker} many questions about {topic}.",
        ]
        sentences.append(rng.choice(forms))
    return " ".join(sentences) + "\n"


# Documents and files.

PAGE_SHARES: tuple[tuple[str, float], ...] = (("clean", 0.45), ("corrupted", 0.45), ("prose", 0.10))
"""Main content of the noisy documents, and the share of the documents with it."""


def _problem_segments(rng: random.Random, forbidden: frozenset[str], corrupted_share: float) -> Iterator[Segment]:
    """Yield a problem line by line, some lines corrupted, sometimes with a line of noise in the middle."""
    lines = make_problem(rng, forbidden)
    interrupted_at = rng.randrange(1, len(lines)) if rng.random() < 0.3 else 0
    for place, line in enumerate(lines):
        if interrupted_at and place == interrupted_at:
            yield "noise", noise_line(rng)
        if place and rng.random() < corrupted_share:
            yield from corrupt_line(rng, line.rstrip("\n"))
        else:
            yield "arithmetic", line


def make_page(rng: random.Random, shape: str, forbidden: frozenset[str]) -> Document:
    """Return a noisy document: boilerplate and noise around content of the given shape (see `PAGE_SHARES`)."""
    segments: list[Segment] = []
    if rng.random() < 0.6:
        segments.append(("boilerplate", boilerplate_line(rng)))
    if rng.random() < 0.5:
        segments.append(("noise", noise_line(rng)))
    for _ in range(rng.randint(1, 3)):
        if shape == "prose":
            segments.append(("prose", prose_line(rng)))
        else:
            segments.extend(_problem_segments(rng, forbidden, 0.6 if shape == "corrupted" else 0.0))
        if rng.random() < 0.4:
            segments.append(("noise", noise_line(rng)))
    if rng.random() < 0.4:
        segments.append(("boilerplate", boilerplate_line(rng)))
    page = Document(tuple(segments))
    return make_page(rng, shape, forbidden) if page.text in forbidden else page


def make_curated(rng: random.Random, count: int, forbidden: frozenset[str]) -> list[Document]:
    """Return `count` clean problems, none of them in `forbidden`."""
    return [Document((("arithmetic", "".join(make_problem(rng, forbidden))),)) for _ in range(count)]


def make_noisy(rng: random.Random, count: int, forbidden: frozenset[str]) -> list[Document]:
    """Return `count` pages in the fixed shares, shuffled; none of their problems or texts is in `forbidden`."""
    shapes = [shape for shape, share in PAGE_SHARES for _ in range(round(share * count))]
    shapes = (shapes + [PAGE_SHARES[0][0]] * count)[:count]
    rng.shuffle(shapes)
    return [make_page(rng, shape, forbidden) for shape in shapes]


def make_corpora(
    output: Path,
    seed: int,
    curated_documents: int = CURATED_DOCUMENTS,
    noisy_documents: int = NOISY_DOCUMENTS,
    heldout_documents: int = HELDOUT_DOCUMENTS,
) -> dict[str, list[Document]]:
    """Write the four files into `output`; the same arguments give the same bytes.

    No held-out problem is in a training file, whole or within a page; no held-out page is a training page.
    """
    names = ("curated", "heldout", "noisy", "noisy heldout")
    streams = (random.Random(f"{seed}/{name}") for name in names)
    curated_rng, heldout_rng, noisy_rng, noisy_heldout_rng = streams
    heldout = make_curated(heldout_rng, heldout_documents, frozenset())
    problems = frozenset(document.text for document in heldout)
    noisy_heldout = make_noisy(noisy_heldout_rng, heldout_documents, problems)
    pages = frozenset(document.text for document in noisy_heldout)
    corpora = {
        "curated_train": make_curated(curated_rng, curated_documents, problems),
        "curated_heldout": heldout,
        "noisy_train": make_noisy(noisy_rng, noisy_documents, problems | pages),
        "noisy_heldout": noisy_heldout,
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, documents in corpora.items():
        lines = (document.to_json(with_spans=name == "noisy_heldout") + "\n" for document in documents)
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="ascii", newline="\n")
    return corpora


def format_table(corpora: dict[str, list[Document]]) -> str:
    """Return a table of every file's documents and characters, and the share of characters of every kind."""
    rows = [f"{'file':<16}{'documents':>10}{'characters':>12}" + "".join(f"{kind:>13}" for kind in KINDS)]
    for name, documents in corpora.items():
        characters: Counter[str] = Counter()
        for kind, text in (segment for document in documents for segment in document.segments):
            characters[kind] += len(text)
        total = sum(characters.values())
        shares = "".join(f"{characters[kind] / max(total, 1):>13.1%}" for kind in KINDS)
        rows.append(f"{name:<16}{len(documents):>10,}{total:>12,}{shares}")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, write the files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the four files into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curated-documents", type=int, default=CURATED_DOCUMENTS)
    parser.add_argument("--noisy-documents", type=int, default=NOISY_DOCUMENTS)
    parser.add_argument("--heldout-documents", type=int, default=HELDOUT_DOCUMENTS, help="in each held-out file")
    arguments = parser.parse_args()
    print(format_table(make_corpora(**vars(arguments))))


if __name__ == "__main__":
    main()
