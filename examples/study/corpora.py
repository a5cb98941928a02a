"""Make the study's corpora: clean arithmetic, a web with little of it, and pages about it with much noise.

They differ by their shares of worked arithmetic (the target domain), of the same with corrupted lines, of boilerplate
and prose, and of random strings that no model can predict. All of it follows from `--seed`.

    curated   problems only, all right: what the reference is trained on. Small.
    web       pages with few problems: what the base model is trained on, which every other run starts from.
    noisy     pages with more, every other problem with corrupted lines: what the compared runs train on.

The pieces are the quickstart's; `spans` of the held-out pages say which characters are of which kind.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_corpora as pieces  # the quickstart's

PROBLEM_SHARE = {"web": 0.07, "noisy": 0.35}
"""The share of a page's blocks that are problems; they are longer than others."""
CORRUPTED_PROBLEMS, CORRUPTED_LINES = 0.5, 0.6
"""Of a page's problems, and of such a problem's lines after its question."""
NOISE_SHARE = 0.5
"""Of the blocks that are no problem: random strings; the others are boilerplate and prose in equal parts."""


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
    return rng.choice(pieces.NAMES.split()), rng.choice(pieces.ITEMS.split()), rng.randint(1, 5), rng.randint(1, 5)


TEMPLATES = (_more, _fewer, _each) * 3 + pieces.TEMPLATES
"""Short problems with small numbers, three of five, beside the quickstart's longer ones."""


def problem(rng: random.Random, forbidden: frozenset[str]) -> list[str]:
    """The lines of a clean problem whose text is not in `forbidden`."""
    while True:
        lines = [line + "\n" for line in rng.choice(TEMPLATES)(rng)]
        if "".join(lines) not in forbidden:
            return lines


def _block(rng: random.Random, share: float, forbidden: frozenset[str]) -> Iterator[pieces.Piece]:
    if rng.random() >= share:
        if rng.random() < NOISE_SHARE:
            yield "noise", pieces.noise_line(rng)
        elif rng.random() < 0.5:
            yield "boilerplate", pieces.boilerplate_line(rng)
        else:
            yield "prose", pieces.prose_line(rng)
        return
    corrupted = CORRUPTED_LINES * (rng.random() < CORRUPTED_PROBLEMS)
    for place, line in enumerate(problem(rng, forbidden)):
        if place and rng.random() < corrupted:
            yield from pieces.corrupt_line(rng, line.rstrip("\n"))
        else:
            yield "arithmetic", line


def pages(rng: random.Random, count: int, share: float, forbidden: frozenset[str]) -> list[pieces.Document]:
    """`count` pages of 4 to 8 blocks."""
    return [
        pieces.Document(tuple(p for _ in range(rng.randint(4, 8)) for p in _block(rng, share, forbidden)))
        for _ in range(count)
    ]


def make(
    output: Path, seed: int, *, curated: int, web: int, noisy: int, heldout: int
) -> dict[str, list[pieces.Document]]:
    """Write the files of JSON lines, `heldout` documents in those for evaluation; no problem of them is trained on."""

    def problems(name: str, count: int, forbidden: frozenset[str] = frozenset()) -> list[pieces.Document]:
        rng = random.Random(f"{seed}/{name}")
        return [pieces.Document((("arithmetic", "".join(problem(rng, forbidden))),)) for _ in range(count)]

    kept_apart = problems("held out", heldout)
    forbidden = frozenset(document.text for document in kept_apart)

    def crawled(name: str, count: int, kind: str) -> list[pieces.Document]:
        return pages(random.Random(f"{seed}/{name}"), count, PROBLEM_SHARE[kind], forbidden)

    corpora = {
        "curated_train": problems("curated", curated, forbidden),
        "curated_heldout": kept_apart,
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
    print(pieces.format_table(make(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
