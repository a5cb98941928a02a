"""Time and memory of the selective loss head against full logits and against other libraries' losses.

Times are taken in one process per size, all contenders in turn, round after round; a ratio is the median over rounds of
contender / full logits in the same round, its spread the distance between the quartiles. malloc is told to keep freed
memory: page faults would otherwise slow the full-logit baseline by a fifth. Memory is the peak of a process of its own
beyond inputs and gradients, with malloc told to return everything at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report

SIZES = [(2048, 1024, 32000), (4096, 576, 49152), (2048, 512, 128256)]
KEEPS = [0.6, 1.0, 0.3, 0.5, 0.7]
MEMORY_KEEPS = [0.6, 1.0]
PEERS_AT = 0.6
KL_TIME, KL_MEMORY = 1.6, 1.1
"""Hoped for of distillation, over cross-entropy at keep 0.6."""
RETAIN = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
"""Nothing is mapped for itself (glibc ignores thresholds beyond 32 MiB), so nothing is unmapped when it is freed."""
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="one size, keep 0.6")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1: CPU time is work then)")
    parser.add_argument("--resume", action="store_true", help="measure only what docs/benchmarks/loss-head.json lacks")
    parser.add_argument("--only", metavar="TEXT", help="only contenders whose name contains this, and the baseline")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    sizes, keeps = (SIZES[:1], KEEPS[:1]) if arguments.quick else (SIZES, KEEPS)
    records = report.read("loss-head") if arguments.resume else []
    done = {(tuple(record["size"]), record["keep"], record["name"]) for record in records}
    missing: dict[str, str] = {}
    for keep in keeps:
        for size in sizes:
            names = [n for n in _contenders(keep, arguments.only) if (size, keep, n) not in done]
            if not names:
                continue
            job = {"size": size, "keep": keep, "rounds": arguments.rounds, "threads": arguments.threads}
            timed = _spawn({**job, "what": "time", "names": names}, RETAIN)
            missing |= timed["missing"]
            memory = {}
            if keep in MEMORY_KEEPS:
                memory = {n: _spawn({**job, "what": "memory", "name": n}, RETURN)["bytes"] for n in timed["names"]}
            new = _records(size, keep, timed, memory)
            records += [r for r in new if (size, keep, r["name"]) not in done]
            records.sort(key=_order)
            report.write(
                "loss-head", _markdown(records, missing, arguments), records, arguments.json
            )  # it takes an hour
    markdown = _markdown(records, missing, arguments)
    report.write("loss-head", markdown, records, arguments.json)
    print(markdown)
    return 0


def _contenders(keep: float, only: str | None) -> list[str]:
    """Names of the steps that are compared at a keep ratio, without the baseline."""
    from benchmarks.loss_peers import BASELINE, STEPS

    only = only or ("" if keep == PEERS_AT else "ours")
    return [name for name in STEPS if name != BASELINE and only in name]


def _order(record: dict[str, Any]) -> tuple[int, int, int]:
    """Where a record stands in the report."""
    from benchmarks.loss_peers import STEPS

    size = SIZES.index(tuple(record["size"]))
    return KEEPS.index(record["keep"]), size, list(STEPS).index(record["name"])


def _spawn(job: dict[str, Any], malloc: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "benchmark.py"), "loss-head"]
    environment = os.environ | malloc | {"OMP_NUM_THREADS": str(job["threads"]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--child", json.dumps(job)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    return _time(job) if job["what"] == "time" else _memory(job)


def _time(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.loss_peers import BASELINE, STEPS, Problem

    # two micro-batches in turn, so that a prediction is made from another one's scores
    problems = [Problem.make(tuple(job["size"]), job["keep"], seed=seed) for seed in (1, 2)]
    problems[1].predictor = problems[0].predictor
    names, missing = [], {}
    for name, step in STEPS.items():
        if name not in job["names"] and name != BASELINE:
            continue
        try:
            for problem in problems:
                _clear(problem)
                step(problem)
            names.append(name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for number in range(job["rounds"]):
        for name in names:
            problem = problems[number % 2]
            _clear(problem)
            started_cpu, started = time.process_time(), time.perf_counter()
            STEPS[name](problem)
            cpu[name].append(time.process_time() - started_cpu)
            wall[name].append(time.perf_counter() - started)
        sys.stderr.write(f"size {job['size']} keep {job['keep']}: round {number + 1} of {job['rounds']}\n")
    return {"names": names, "missing": missing, "cpu": cpu, "wall": wall}


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.loss_peers import STEPS, Problem

    step = STEPS[job["name"]]
    # what a first call loads, compiles or starts does not count: once at full size, so that compilers know the shape
    problem = Problem.make(tuple(job["size"]), job["keep"], seed=1)
    step(problem)
    _clear(problem)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status("VmRSS")
    step(problem)
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (problem.hidden_Nd, problem.weight_Vd))
    return {"bytes": max(0, _status("VmHWM") - before - gradients)}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _clear(problem: Any) -> None:
    problem.hidden_Nd.grad = problem.weight_Vd.grad = None


def _records(size: tuple[int, ...], keep: float, timed: dict[str, Any], memory: dict[str, int]) -> list[dict[str, Any]]:
    base, *_ = timed["names"]
    records = []
    for name in timed["names"]:
        ratios = [a / b for a, b in zip(timed["cpu"][name], timed["cpu"][base], strict=True)]
        walls = [a / b for a, b in zip(timed["wall"][name], timed["wall"][base], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        records.append(
            {
                "name": name,
                "size": list(size),
                "keep": keep,
                "cpu_ratio": round(statistics.median(ratios), 3),
                "wall_ratio": round(statistics.median(walls), 3),
                "memory_ratio": round(memory[name] / memory[base], 3) if memory else None,
                "spread": round(quartiles[2] - quartiles[0], 3),
            }
        )
    return records


def _markdown(records: list[dict[str, Any]], missing: dict[str, str], arguments: argparse.Namespace) -> str:
    floor = {keep: (1 + 2 * keep) / 3 for keep in KEEPS}
    out = [
        "# The loss head\n\n"
        "Time and peak extra memory of one micro-batch's loss (forward, selection, backward), divided by those of full "
        "logits with `F.cross_entropy` and a mask; lower is better. fp32 on a CPU. Made by `python tools/benchmark.py "
        f"loss-head`: {report.environment()}, {arguments.threads} threads, {arguments.rounds} rounds in turn. "
        "Medians of ratios of CPU time, in brackets the distance between the quartiles; memory in the order of the "
        f"sizes. Other libraries' losses at keep {PEERS_AT}.\n"
    ]
    for keep in dict.fromkeys(record["keep"] for record in records):
        rows_of = [record for record in records if record["keep"] == keep]
        sizes = list(dict.fromkeys(tuple(record["size"]) for record in rows_of))
        header = ["", *(f"V = {vocab:,} (N {rows:,}, d {width:,})" for rows, width, vocab in sizes), "memory"]
        rows = []
        for name in dict.fromkeys(record["name"] for record in rows_of):
            mine = {tuple(record["size"]): record for record in rows_of if record["name"] == name}
            cells = [f"{r['cpu_ratio']:.2f} ({r['spread']:.2f})" if (r := mine.get(s)) else "-" for s in sizes]
            memory = " / ".join(
                f"{r['memory_ratio']:.2f}" for s in sizes if (r := mine.get(s)) and r["memory_ratio"] is not None
            )
            rows.append([name, *cells, memory or "not measured"])
        rows.append(["floor: the products alone", *([f"{floor[keep]:.2f}"] * len(sizes)), ""])
        out += [f"\n## Keep ratio {keep}\n\n", report.table(header, rows)]
    out += _distillation(records)
    if not arguments.only:  # of a report that is gone on with, the reasons are not known any more
        from benchmarks.loss_peers import STEPS

        shown = {record["name"] for record in records}
        missing = {name: missing.get(name, "could not run") for name in STEPS if name not in shown}
    if missing:
        out += ["\n## Missing here\n\n", *(f"- {name}: {reason}\n" for name, reason in missing.items())]
    return "".join(out)


def _distillation(records: list[dict[str, Any]]) -> list[str]:
    """What distillation adds to the same variant's cross-entropy: the rows of `kl` over those of `ours`."""
    of = {(record["name"], tuple(record["size"]), record["keep"]): record for record in records}
    rows = []
    for (name, size, keep), kl in of.items():
        base = of.get((name.replace("kl: ", "ours: "), size, keep))
        if not name.startswith("kl: ") or base is None:
            continue
        time_ratio = kl["cpu_ratio"] / base["cpu_ratio"]
        measured = kl["memory_ratio"] is not None and base["memory_ratio"]
        memory = f"{kl['memory_ratio'] / base['memory_ratio']:.2f}" if measured else "not measured"
        rows.append([name.removeprefix("kl: "), f"{size[2]:,}", str(keep), f"{time_ratio:.2f}", memory])
    if not rows:
        return []
    return [
        "\n## Distillation over cross-entropy\n\n"
        "Rows of `kl` (a reference as wide as the model) divided by those of the same variant without it: ratios of "
        f"the medians above. Hoped for: at most {KL_TIME} of the time and {KL_MEMORY} of the memory at keep 0.6.\n\n",
        report.table(["variant", "V", "keep", "time", "memory"], rows),
    ]
