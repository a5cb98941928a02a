"""The comparison of backward passes on real text: corpora from JSON lines, and the runs of a model of six layers.

    python examples/study/real_text.py make --curated A.jsonl --web B.jsonl C.jsonl --out runs/study_real
    python examples/study/real_text.py train --out runs/study_real
    python examples/study/real_text.py results --out runs/study_real

A part of the curated documents is held out, a part trains the reference, and the rest is mixed into the web documents
that CLM and SLM train on, with the exact backward pass and with those of `rows.py`. Every step is a process of its own;
what is finished is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rows import KEEP_RATIO, METHODS, write_rows
from study import HERE, Planned, train

SEEDS = (1, 2, 3)
NUM_HELD_OUT = 300
VOCABULARY = 4096
STEPS = 3000
REFERENCE_STEPS = 1000
MODEL = (
    "--num-layers", "6", "--hidden-size", "192", "--ffn-hidden-size", "512", "--num-attention-heads", "6",
    "--micro-batch-size", "8", "--global-batch-size", "8", "--lr-warmup-iters", "40", "--eval-interval", "100",
)  # fmt: skip


def split(curated: Sequence[str], web: Sequence[str], seed: int, *, held_out: int) -> dict[str, list[str]]:
    """Held-out documents, those of the reference, and the mix; no curated document is in two of them."""
    shuffled = sorted(set(curated))
    random.Random(seed).shuffle(shuffled)
    rest = shuffled[held_out:]
    mixed = [*rest[len(rest) // 2 :], *web]
    random.Random(seed + 1).shuffle(mixed)
    return {"curated_heldout": shuffled[:held_out], "curated_train": rest[: len(rest) // 2], "noisy_train": mixed}


def read(paths: Sequence[Path]) -> list[str]:
    """The texts of JSON lines files (field `text`)."""
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines() if line.strip()]


def make(out: Path, curated: Sequence[Path], web: Sequence[Path], *, fast: bool) -> None:
    """Write the texts, a tokenizer, and the corpora."""
    parts = split(read(curated), read(web), 0, held_out=20 if fast else NUM_HELD_OUT)
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        path = out / "text" / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    texts = [str(out / "text" / f"{name}_train.jsonl") for name in ("curated", "noisy")]
    size = str(512 if fast else VOCABULARY)
    _tool("train_tokenizer", "--input", *texts, "--vocab-size", size, "--output", f"{out}/tokenizer/")
    model = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{out}/tokenizer/tokenizer.model")
    for name in parts:
        prefix = f"{out}/corpora/{name}"
        _tool(
            "preprocess_data", "--input", f"{out}/text/{name}.jsonl", "--output-prefix", prefix, *model, "--append-eod"
        )


def _tool(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, f"tools/{name}.py", *flags], check=True)


def planned(out: Path, seed: int, steps: int = STEPS) -> list[Planned]:
    """All runs of a seed."""
    folder = out / f"seed{seed}"
    length = ("--train-iters", str(steps), "--save-interval", str(steps))

    def run(name: str, wave: int, corpus: str, *flags: str) -> Planned:
        data = ("--data-path", f"{out}/corpora/{corpus}_train_text_document")
        return Planned(name=name, folder=folder / name, seed=seed, wave=wave, selection=(),
                       flags=(*MODEL, *length, *data, *flags))  # fmt: skip

    by_reference = ("--objective", "slm", "--slm-keep-ratio", str(KEEP_RATIO))
    by_reference += ("--reference-load", f"{folder}/reference/checkpoints")
    shorter = ("--train-iters", str(REFERENCE_STEPS), "--save-interval", str(REFERENCE_STEPS))
    runs = [run("reference", 0, "curated", "--objective", "clm", *shorter)]
    runs += [run("clm", 0, "noisy", "--objective", "clm"), run(f"slm-{KEEP_RATIO}", 1, "noisy", *by_reference)]
    return runs + [run(name, 1, "noisy", *by_reference, *flags) for name, flags in METHODS.items()]


def main() -> None:
    """Make, train, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "train", "results"])
    parser.add_argument("--out", type=Path, default=Path("runs/study_real"), help="where everything is")
    parser.add_argument("--curated", type=Path, nargs="+", default=[], help="JSON lines of curated text (for make)")
    parser.add_argument("--web", type=Path, nargs="+", default=[], help="JSON lines of other text (for make)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of CLM and SLM (default {STEPS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core")
    parser.add_argument("--fast", action="store_true", help="a few steps, with one seed")
    args = parser.parse_args()
    if args.what == "make":
        make(args.out, args.curated, args.web, fast=args.fast)
        return
    seeds = SEEDS[:1] if args.fast else args.seeds
    runs = [
        run for alike in zip(*(planned(args.out, seed, args.steps) for seed in seeds), strict=True) for run in alike
    ]
    if args.what == "train":
        train(args.out, runs, fast=args.fast, jobs=args.jobs, held_out={"target": "curated"})
        return
    from results import Results

    print(f"wrote {write_rows(args.out, Results(runs), HERE.parents[1] / 'docs/benchmarks/backward.json')}")


if __name__ == "__main__":
    main()
