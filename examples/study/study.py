"""Run the study: train all runs (`train`), or analyze the finished ones and write the page (`results`).

Every seed trains a base model (on the web corpus) and continues it: the reference (on the curated corpus), CLM and SLM
(on the noisy corpus, in the same order), SLM with random tokens, SLM with the reference's loss alone as score, and
self-reference, which uses the CLM run as reference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import losses  # beside this file
import rows

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
RATIOS = (0.6, 0.4, 0.8, 0.5, 0.7, 0.9)
"""Keep ratios, the paper's first, so that an interrupted study has the most important runs."""
HELD_OUT = {"target": "curated", "noisy": "noisy"}
ANALYZED_WITH = ("--slm-keep-ratio", "0.6")
"""Selection for analyzing runs that train on all tokens."""
BASE = ("--train-iters", "480", "--save-interval", "480", "--lr", "3e-3", "--lr-decay-style", "constant")
REFERENCE = ("--train-iters", "160", "--save-interval", "160")
"""Three epochs of the curated corpus, as in the paper."""
FAST = (
    "--train-iters",
    "6",
    "--save-interval",
    "2",
    "--eval-interval",
    "2",
    "--lr-warmup-iters",
    "1",
    "--eval-iters",
    "1",
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of the study."""

    name: str
    folder: Path
    seed: int
    wave: int
    """Position in the order of training: a run depends on runs of earlier waves."""
    flags: tuple[str, ...]
    selection: tuple[str, ...]
    """Flags of the selection it trains with, or (for runs on all tokens) is analyzed with."""

    @property
    def answers(self) -> bool:
        """True if the model is asked to solve problems."""
        return self.name.startswith(("reference", "clm", "slm")) or self.name == "random-0.6"

    @property
    def followed(self) -> bool:
        """True if losses of kept and other tokens are recorded over its checkpoints."""
        return self.name in ("clm", "slm-0.6", "random-0.6")

    @property
    def is_finished(self) -> bool:
        """True if training is complete."""
        return (self.folder / "finished").exists()


def joined(*groups: Sequence[str]) -> tuple[str, ...]:
    """Join flags; one that comes again takes the place of the earlier, since a run is given a flag once."""
    found: dict[str, list[str]] = {}
    for word in (word for group in groups for word in group):
        if word.startswith("--"):
            found[word] = words = [word]
        else:
            words.append(word)
    return tuple(word for words in found.values() for word in words)


def planned(out: Path, seed: int, ratios: Sequence[float] = RATIOS) -> Iterator[Planned]:
    """Yield all runs of a seed."""
    folder = out / f"seed{seed}"
    by_reference = ("--reference-load", f"{folder}/reference/checkpoints")
    by_itself = ("--reference-load", f"{folder}/clm/checkpoints")

    def run(name: str, wave: int, corpus: str, *flags: str, selection: tuple[str, ...] = ANALYZED_WITH) -> Planned:
        flags = ("--data-path", f"{out}/corpora/{corpus}_train_text_document", *flags)
        if wave:
            flags = (*flags, "--init-from", f"{folder}/base/checkpoints")
        return Planned(name=name, folder=folder / name, seed=seed, wave=wave, flags=flags, selection=selection)

    def selective(name: str, ratio: float, *flags: str, wave: int = 2) -> Planned:
        selection = ("--slm-keep-ratio", str(ratio), *flags)
        return run(f"{name}-{ratio}", wave, "noisy", "--objective", "slm", *selection, selection=selection)

    yield run("base", 0, "web", "--objective", "clm", *BASE)
    yield run("reference", 1, "curated", "--objective", "clm", *REFERENCE)
    yield run("clm", 1, "noisy", "--objective", "clm")
    for ratio in ratios:
        yield selective("slm", ratio, *by_reference)
        yield selective("random", ratio, "--slm-score", "random")
        if ratio == ratios[0]:
            yield selective("reference-loss", ratio, *by_reference, "--slm-score", "reference-loss")
            for own in (ratio, 0.9):  # the paper's range, in which it is best at 0.7 to 0.6
                yield selective("self-reference", own, *by_itself, "--slm-score", "reference-loss")


def planned_rows(out: Path, seed: int) -> list[Planned]:
    """List the runs of a seed that compare backward passes: those they need of the study, and their own."""
    ratio = rows.KEEP_RATIO
    needed = ("base", "reference", "clm", f"slm-{ratio}")
    runs = [run for run in planned(out, seed, (ratio,)) if run.name in needed]
    exact, clean = runs[-1], runs[1]
    runs.append(_variant(clean, rows.CLEAN, rows.SAMPLED))
    return runs + [_variant(exact, name, flags) for name, flags in rows.METHODS.items()]


def planned_losses(out: Path, seed: int) -> list[Planned]:
    """List the runs of a seed that compare losses: those they need of the study, and their own."""
    needed = ("base", "reference", *losses.COMPARED_WITH)
    runs = [run for run in planned(out, seed, (0.6,)) if run.name in needed]
    clm, reference = (next(run for run in runs if run.name == name) for name in ("clm", "reference"))
    start = tuple(word for word in clm.flags if word not in ("--objective", "clm"))
    by_reference = ("--objective", "slm", "--reference-load", f"{reference.folder}/checkpoints")
    for name, (selection, loss) in losses.METHODS.items():
        flags = (*start, *by_reference, *selection, *loss)
        runs.append(
            replace(clm, name=name, folder=clm.folder.with_name(name), wave=2, flags=flags, selection=selection)
        )
    return runs


def _variant(run: Planned, name: str, flags: tuple[str, ...]) -> Planned:
    """Return the same run with further flags."""
    return replace(run, name=name, folder=run.folder.with_name(name), flags=(*run.flags, *flags))


def train(out: Path, runs: Sequence[Planned], *, fast: bool, jobs: int, held_out: Mapping[str, str] = HELD_OUT) -> None:
    """Train every unfinished run, `jobs` at a time, each in a process of its own.

    Raises:
        SystemExit: a run failed.
    """
    for wave in sorted({run.wave for run in runs}):
        with ThreadPoolExecutor(jobs) as pool:
            started = [pool.submit(_train_one, out, run, fast, held_out) for run in runs if run.wave == wave]
            try:
                for one in as_completed(started):
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _train_one(out: Path, run: Planned, fast: bool, held_out: Mapping[str, str] = HELD_OUT) -> None:
    if run.is_finished:
        return
    shutil.rmtree(run.folder, ignore_errors=True)  # left by an interrupted call
    run.folder.mkdir(parents=True)
    print(f"-- seed {run.seed}: {run.name}", flush=True)
    command = [sys.executable, "tools/pretrain_slm.py", *flags_of(out, run, fast, held_out)]
    with (run.folder / "log.txt").open("w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"{run.name} of seed {run.seed} failed: see {run.folder}/log.txt")
    (run.folder / "finished").touch()


def flags_of(out: Path, run: Planned, fast: bool, held_out: Mapping[str, str] = HELD_OUT) -> tuple[str, ...]:
    """Return all flags of a run."""
    sets = [f"{name}={out}/corpora/{corpus}_heldout_text_document" for name, corpus in held_out.items()]
    own = ("--seed", str(run.seed), "--run-dir", str(run.folder), "--valid-data-path", *sets)
    tokenizer = ("--tokenizer-model", f"{out}/tokenizer/tokenizer.model")
    return joined(("--config", str(HERE / "train.yaml")), run.flags, tokenizer, own, FAST if fast else ())


def main() -> None:
    """Train, or analyze and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["train", "results"])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run (default: three, or five with --rows)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--fast", action="store_true", help="a few steps of a few runs, with one seed")
    parser.add_argument(
        "--rows", action="store_true", help="train or report the runs that compare backward passes (rows.py)"
    )
    parser.add_argument(
        "--losses", action="store_true", help="train or report the runs that compare losses (losses.py)"
    )
    args = parser.parse_args()
    if args.rows and args.losses:
        parser.error("use --rows or --losses, not both")
    default = rows.SEEDS if args.rows else SEEDS
    seeds, ratios = (SEEDS[:1], RATIOS[:2]) if args.fast else (args.seeds or default, RATIOS)
    # seed by seed within each kind of run, so that an interrupted study has several seeds of the first kinds
    plan = planned_rows if args.rows else planned_losses if args.losses else None
    plans = [plan(args.out, seed) if plan else list(planned(args.out, seed, ratios)) for seed in seeds]
    runs = [run for alike in zip(*plans, strict=True) for run in alike]
    if args.command == "train":
        train(args.out, runs, fast=args.fast, jobs=args.jobs)
        return
    from analyses import analyze, look_inside  # both modules are in this folder
    from results import Results, write_results

    if args.losses:
        for run in runs:
            look_inside(args.out, run)
        print(f"wrote {losses.write_losses(args.out, Results(runs))}")
        return
    analyze(args.out, runs)
    if args.rows:
        benchmark = HERE.parents[1] / "docs/benchmarks/backward.json"
        print(f"wrote {rows.write_rows(args.out, Results(runs), benchmark)}")
        return
    print(f"wrote {write_results(args.out, runs)}")


if __name__ == "__main__":
    main()
