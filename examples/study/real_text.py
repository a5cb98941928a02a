"""The comparison of backward passes on real text: corpora from JSON lines, and the runs of a model of six layers.

    python examples/study/real_text.py make --curated A.jsonl --web B.jsonl C.jsonl --out runs/study_real
    python examples/study/real_text.py train --out runs/study_real
    python examples/study/real_text.py results --out runs/study_real

A part of the curated documents is held out, a part trains the reference, and the rest is mixed into the web documents
that CLM and SLM train on, with the exact backward pass and with those of `rows.py`; the reference's training is
repeated with sampled rows. Every run is a process of its own; what is finished is not made again. Flags that are not
listed here are those of tools/pretrain_slm.py, for every run: `train --hidden-size 96` trains narrower models.
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

from rows import CLEAN, KEEP_RATIO, METHODS, SAMPLED, write_rows
from study import HERE, Planned, joined, train

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
    """The texts of JSON lines files (field `text`); other ends of lines than a newline are part of a text."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").split("\n")]
    return [json.loads(line)["text"] for line in lines if line.strip()]


def make(out: Path, curated: Sequence[Path], web: Sequence[Path], *, vocabulary: int, held_out: int) -> None:
    """Write the texts, a tokenizer, and the corpora."""
    parts = split(read(curated), read(web), 0, held_out=held_out)
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        path = out / "text" / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    texts = [str(out / "text" / f"{name}_train.jsonl") for name in ("curated", "noisy")]
    _tool("train_tokenizer", "--input", *texts, "--vocab-size", str(vocabulary), "--output", f"{out}/tokenizer/")
    model = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{out}/tokenizer/tokenizer.model")
    for name in parts:
        prefix = f"{out}/corpora/{name}"
        _tool(
            "preprocess_data", "--input", f"{out}/text/{name}.jsonl", "--output-prefix", prefix, *model, "--append-eod"
        )


def _tool(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, f"tools/{name}.py", *flags], check=True)


def planned(
    out: Path, seed: int, steps: int = STEPS, reference_steps: int = REFERENCE_STEPS, flags: Sequence[str] = ()
) -> list[Planned]:
    """All runs of a seed.

    Args:
        steps, reference_steps: of CLM and SLM, and of the reference.
        flags: of every run, in the place of `MODEL`'s.
    """
    folder = out / f"seed{seed}"

    def run(name: str, wave: int, corpus: str, length: int, *own: str) -> Planned:
        data = ("--data-path", f"{out}/corpora/{corpus}_train_text_document")
        iterations = ("--train-iters", str(length), "--save-interval", str(length))
        return Planned(name=name, folder=folder / name, seed=seed, wave=wave, selection=(),
                       flags=joined(MODEL, flags, iterations, data, own))  # fmt: skip

    clm = ("--objective", "clm")
    load = ("--reference-load", f"{folder}/reference/checkpoints")
    by_reference = ("--objective", "slm", "--slm-keep-ratio", str(KEEP_RATIO), *load)
    runs = [run("reference", 0, "curated", reference_steps, *clm), run("clm", 0, "noisy", steps, *clm)]
    runs.append(run(f"slm-{KEEP_RATIO}", 1, "noisy", steps, *by_reference))
    runs += [run(name, 1, "noisy", steps, *by_reference, *rows) for name, rows in METHODS.items()]
    return [*runs, run(CLEAN, 1, "curated", reference_steps, *clm, *SAMPLED)]


def main() -> None:
    """Make, train, or write the page."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("what", choices=["make", "train", "results"])
    parser.add_argument("--out", type=Path, default=Path("runs/study_real"), help="where everything is")
    parser.add_argument("--curated", type=Path, nargs="+", default=[], help="JSON lines of curated text (for make)")
    parser.add_argument("--web", type=Path, nargs="+", default=[], help="JSON lines of other text (for make)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of CLM and SLM (default {STEPS})")
    length, size = f"of the reference (default {REFERENCE_STEPS})", f"of the BPE (for make; default {VOCABULARY})"
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS, help=length)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=size)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core")
    parser.add_argument("--fast", action="store_true", help="a few steps, with one seed")
    args, further = parser.parse_known_args()
    if further and args.what != "train":
        parser.error(f"{further[0]} is a flag of runs: use it with train alone")
    if args.what == "make":
        vocabulary, held_out = (512, 20) if args.fast else (args.vocabulary, NUM_HELD_OUT)
        make(args.out, args.curated, args.web, vocabulary=vocabulary, held_out=held_out)
        return
    seeds = SEEDS[:1] if args.fast else args.seeds
    plans = [planned(args.out, seed, args.steps, args.reference_steps, further) for seed in seeds]
    runs = [run for alike in zip(*plans, strict=True) for run in alike]
    if args.what == "train":
        train(args.out, runs, fast=args.fast, jobs=args.jobs, held_out={"target": "curated"})
        return
    from results import Results

    benchmark = HERE.parents[1] / "docs/benchmarks/backward.json"
    command = "real_text.py results"
    print(f"wrote {write_rows(args.out, Results(runs), benchmark, command=command)}")


if __name__ == "__main__":
    main()
