"""Make the study's corpora: clean arithmetic, web pages with little of it, and noisy pages with more of it.

They differ in their shares of worked arithmetic (the target domain), of arithmetic with corrupted lines, of
boilerplate and prose, and of random strings that no model can predict. `--seed` determines all of it.

    curated   problems only, all correct; small. Trains the reference.
    web       pages with few problems. Trains the base model, from which every other run starts.
    noisy     pages with more problems, every other one with corrupted lines. Trains the compared runs.

The segments are the quickstart's; `spans` of the held-out pages label the kind of every character.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_corpora as quickstart

PROBLEM_SHARE = {"web": 0.07, "noisy": 0.35}
"""Share of a page's blocks that are problems, which are longer than other blocks."""
CORRUPTED_PROBLEMS, CORRUPTED_LINES = 0.5, 0.6
"""Share of a page's problems with corrupted lines, and of the corrupted lines after such a problem's question."""
NOISE_SHARE = 0.5
"""Share of random strings among the other blocks; the rest is boilerplate and prose in equal parts."""


def _more(rng: random.Random) -> list[str]:
    name, item, have, found = _someone(rng)
    return [f"Question: {name} has {have} {item} and finds {found} more. How many now?", f"Answer: {have + found}"]


def _fewer(rng: random.Random) -> list[str]:
    name, item, left, lost = _someone(rng)
    return [f"Question: {name} had {left + lost} {item} and lost {lost}. How many now?", f"Answer: {left}"]


def _each(rng: random.Random) -> list[str]:
    name, item, count, each = _someone(rng)
    return [f"Question: {name} has {count} bags of {each} {item}. How many in all?", f"Answer: {count * each}"]


def _someone(rng: random.Random) -> tuple[str, str, int, int]:
    return (
        rng.choice(quickstart.NAMES.split()),
        rng.choice(quickstart.ITEMS.split()),
        rng.randint(1, 5),
        rng.randint(1, 5),
    )


TEMPLATES = (_more, _fewer, _each) * 3 + quickstart.TEMPLATES
"""Short problems with small numbers (three of five), and the quickstart's longer ones."""


def problem(rng: random.Random, forbidden: frozenset[str]) -> list[str]:
    """Return the lines of a clean problem whose text is not in `forbidden`."""
    while True:
        lines = [line + "\n" for line in rng.choice(TEMPLATES)(rng)]
        if "".join(lines) not in forbidden:
            return lines


def _block(rng: random.Random, share: float, forbidden: frozenset[str]) -> Iterator[quickstart.Segment]:
    if rng.random() >= share:
        if rng.random() < NOISE_SHARE:
            yield "noise", quickstart.noise_line(rng)
        elif rng.random() < 0.5:
            yield "boilerplate", quickstart.boilerplate_line(rng)
        else:
            yield "prose", quickstart.prose_line(rng)
        return
    corrupted = CORRUPTED_LINES if rng.random() < CORRUPTED_PROBLEMS else 0.0
    for place, line in enumerate(problem(rng, forbidden)):
        if place and rng.random() < corrupted:
            yield from quickstart.corrupt_line(rng, line.rstrip("\n"))
        else:
            yield "arithmetic", line


def pages(rng: random.Random, count: int, share: float, forbidden: frozenset[str]) -> list[quickstart.Document]:
    """Return `count` pages of 4 to 8 blocks."""
    return [
        quickstart.Document(tuple(p for _ in range(rng.randint(4, 8)) for p in _block(rng, share, forbidden)))
        for _ in range(count)
    ]


def make(
    output: Path, seed: int, *, curated: int, web: int, noisy: int, heldout: int
) -> dict[str, list[quickstart.Document]]:
    """Write the corpora as JSON lines, with given numbers of documents; held-out problems occur in no training file."""

    def problems(name: str, count: int, forbidden: frozenset[str] = frozenset()) -> list[quickstart.Document]:
        rng = random.Random(f"{seed}/{name}")
        return [quickstart.Document((("arithmetic", "".join(problem(rng, forbidden))),)) for _ in range(count)]

    held_out = problems("held out", heldout)
    forbidden = frozenset(document.text for document in held_out)

    def crawled(name: str, count: int, kind: str) -> list[quickstart.Document]:
        return pages(random.Random(f"{seed}/{name}"), count, PROBLEM_SHARE[kind], forbidden)

    corpora = {
        "curated_train": problems("curated", curated, forbidden),
        "curated_heldout": held_out,
        "web_train": crawled("web", web, "web"),
        "noisy_train": crawled("noisy", noisy, "noisy"),
        "noisy_heldout": crawled("noisy held out", heldout // 4, "noisy"),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, documents in corpora.items():
        lines = (document.to_json(with_spans=name == "noisy_heldout") + "\n" for document in documents)
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="ascii", newline="\n")
    return corpora


def main() -> None:
    """Parse the command line, write the files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the files into")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("curated", 1500), ("web", 6000), ("noisy", 6000), ("heldout", 400)):
        parser.add_argument(f"--{name}", type=int, default=default, help="documents")
    print(quickstart.format_table(make(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
