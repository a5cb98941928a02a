"""How long training stands still for a save: synchronous against asynchronous, by the same code and disk.

One world of two pipeline stages trains and saves, in turns, synchronously (every rank writes, checksums and syncs its
files while all wait) and with --async-save (copies, and threads that write and commit them while training goes on).
Counted is all the time that a save keeps the loop from training, on the slowest rank: the copy, and the messages at
every step until it is committed. The first asynchronous save, which also touches its memory for the first time, is
shown apart. Steps beside a write are slower where the two share cores, as here: shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report, world

NUM_RANKS = 2
VOCAB_SIZE = 1024
SEQ_LENGTH = 128
WIDTHS = {"small": 256, "large": 1024}
"""Hidden sizes: 3.7 and 52 million parameters in 4 layers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="the small model alone")
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind (default 7)")
    parser.add_argument("--folder", help="where to save (default: the system's temporary folder)")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    records: list[dict[str, Any]] = []
    for size in ["small"] if arguments.quick else WIDTHS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            job = {"size": size, "rounds": arguments.rounds, "folder": folder}
            _write_corpus(Path(folder))
            records += world.run("checkpoint", job, num_ranks=NUM_RANKS)
    markdown = _markdown(records)
    report.write("checkpoint", markdown, records, arguments.json)
    print(markdown)
    return 0


def _write_corpus(folder: Path) -> None:
    import numpy as np

    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    with IndexedCorpusWriter(folder / "corpus", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, VOCAB_SIZE - 1, 64 * SEQ_LENGTH))


def _flags(job: dict[str, Any]) -> list[str]:
    folder, width = job["folder"], WIDTHS[job["size"]]
    values = {
        "num-layers": 4,
        "hidden-size": width,
        "ffn-hidden-size": 11 * width // 4,
        "num-attention-heads": 8,
        "data-path": f"{folder}/corpus",
        "objective": "clm",
        "run-dir": f"{folder}/run",
        "save": f"{folder}/saved",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB_SIZE - 1,
        "seq-length": SEQ_LENGTH,
        "pipeline-model-parallel-size": NUM_RANKS,
        "micro-batch-size": 1,
        "global-batch-size": 4,
        "train-iters": 10_000,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# ---- one process of it ------------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megatron_slm.checkpoint.retention import Retention
    from megatron_slm.checkpoint.save import Saver
    from megatron_slm.flags.load import parse
    from megatron_slm.log import setup_logging
    from megatron_slm.parallel.groups import init_distributed
    from megatron_slm.run.plan import make_plan
    from megatron_slm.training.build import build_run

    setup_logging(int(os.environ["RANK"]))
    init_distributed()
    trained = build_run(make_plan(parse(_flags(job))[0], dist.get_world_size(), rank=dist.get_rank()))
    savers = {
        kind: Saver(trained.saver.writer, asynchronous=kind == "asynchronous", retention=Retention(keep_last=1))
        for kind in ("synchronous", "asynchronous")
    }
    loop = _Loop(trained)
    for _ in range(2):
        loop.step()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in savers}
    for _ in range(job["rounds"] + 1):
        for kind, saver in savers.items():
            found[kind].append(loop.saved_and_committed(saver))
    records = [_record(job, trained.plan.models.architecture.num_parameters, kind, found[kind]) for kind in savers]
    for record in records:
        record["blocked_share"] = round(record["blocked_seconds"] / records[0]["blocked_seconds"], 4)
    return records


class _Loop:
    """A training loop that does nothing but step and save."""

    def __init__(self, trained: Any) -> None:
        self.trained, self.number = trained, 0

    def step(self) -> float:
        """One training step; its seconds on the slowest rank."""
        from megatron_slm.loss.objective import StepSettings

        source = partial(self.trained.train_source.micro_batch, self.number * 4)
        self.number += 1
        started = time.perf_counter()
        self.trained.trainer.train_step(source, StepSettings(step=self.number), is_last=False)
        return _slowest(time.perf_counter() - started)

    def saved_and_committed(self, saver: Any) -> dict[str, float]:
        """One save, training on until it is committed; what it took."""
        from megatron_slm.checkpoint.state import RunState

        free = [self.step() for _ in range(2)]
        state = RunState(step=self.number, consumed_samples=4 * self.number, adam_step=self.number)
        started = time.perf_counter()
        saved, beside = saver.save(self.trained.trainer.engine.optimizer, state), []
        while saved is None:
            beside.append(self.step())
            saved = saver.poll()
        return {
            "blocked": _slowest(saved.blocked_seconds),
            "until_committed": time.perf_counter() - started,
            "free_step": statistics.mean(free),
            "step_beside_a_write": statistics.mean(beside or free),
            "num_bytes": float(saved.num_bytes),
        }


def _slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _record(job: dict[str, Any], num_parameters: int, kind: str, found: list[dict[str, float]]) -> dict[str, Any]:
    first, later = found[0], found[1:]

    def median(name: str) -> float:
        return round(statistics.median(one[name] for one in later), 4)

    blocked = sorted(one["blocked"] for one in later)
    return {
        "kind": kind,
        "size": job["size"],
        "num_parameters": num_parameters,
        "num_bytes": int(first["num_bytes"]),
        "blocked_seconds": median("blocked"),
        "blocked_seconds_least": round(blocked[0], 4),
        "blocked_seconds_most": round(blocked[-1], 4),
        "blocked_seconds_first": round(first["blocked"], 4),
        "until_committed_seconds": median("until_committed"),
        "free_step_seconds": median("free_step"),
        "step_beside_a_write_seconds": median("step_beside_a_write"),
    }


def _markdown(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{record['num_parameters'] / 1e6:.1f} M",
            f"{record['num_bytes'] / 2**20:,.0f}",
            record["kind"],
            f"{record['blocked_seconds']:.3f}",
            f"{record['blocked_seconds_least']:.3f} to {record['blocked_seconds_most']:.3f}",
            f"{100 * record['blocked_share']:.1f} %",
            f"{record['blocked_seconds_first']:.3f}",
            f"{record['until_committed_seconds']:.2f}",
            f"{record['free_step_seconds']:.2f}",
            f"{record['step_beside_a_write_seconds']:.2f}",
        ]
        for record in records
    ]
    header = (
        "parameters", "MiB", "save", "blocked, s", "range", "of synchronous", "first save, s", "until committed, s",
        "free step, s", "step beside a write, s",
    )  # fmt: skip
    return (
        "# Saving\n\n"
        f"{report.environment()}; two pipeline stages of one thread each, fp32 weights and Adam's moments, synced to a "
        "local disk. Medians; time on the slowest rank. Made by `python tools/benchmark.py checkpoint`.\n\n"
        f"{report.table(header, rows)}\n"
        "**Blocked** is all the time a save keeps the loop from training: of a synchronous one, all of it; of an "
        "asynchronous one the copy, and messages at every step until it is committed. The first "
        "asynchronous save also touches the copies' memory for the first time. On this machine training and writing "
        "share the cores, so steps beside a write are slower; where a host has cores to spare they need not be.\n"
    )
