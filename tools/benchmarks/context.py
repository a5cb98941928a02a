"""What cutting sequences over two ranks costs, beside a half of the computation and the gathers of keys and values.

Two worlds of two ranks, of the same model and reference: in one each rank has samples of half the length (data
parallelism), in the other both share every sample (context parallelism). So a rank has the same number of tokens, and
the ranks sum the same gradients. Computations are slept out: an emulated forward pass of a rank's tokens takes 1 unit,
a backward pass 2, the reference's 1; collectives are real and come on top. The gathers are timed by themselves, as
many and as large as a step has them: what is left is what the system adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import emulation, report, world

SEQ_LENGTH, WIDTH, HEADS, BLOCKS = 512, 16, 4, 2
MICRO_BATCHES = 4
GATHERS_TIMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    emulation.add_flags(parser, quick="a single round", unit_ms=30.0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    rounds = 1 if arguments.quick else arguments.rounds
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
        }
        emulation.write_inputs(Path(folder), seq_length=SEQ_LENGTH, shape=shape)
        for size in (1, 2):
            job = {"context": size, "rounds": rounds, "unit_seconds": arguments.unit_ms / 1000, "folder": folder}
            [found[size]] = world.run("context", job, num_ranks=2)
    record = _record(found[1], found[2])
    markdown = _markdown(record, arguments, rounds)
    report.write("context", markdown, [record], arguments.json)
    print(markdown)
    return 0


# ---- one process of a world --------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron_slm.engine.schedule.costs import Costs, Work
    from megatron_slm.engine.schedule.modes import Mode
    from megatron_slm.engine.schedule.search import choose_schedule

    run_ = emulation.built_run(_flags(job))
    engine, unit, stopwatch = run_.trainer.engine, job["unit_seconds"], emulation.Stopwatch()
    lengths = {Work.FORWARD: unit, Work.BACKWARD: 2 * unit, Work.REFERENCE: unit}
    engine._timing = emulation.slept_out(lengths.__getitem__, stopwatch)
    stopwatch.watch()
    stepper = emulation.Stepper(engine, run_.train_source.micro_batch, batch_size=_batch_size(job))
    context = replace(engine.context, schedule=choose_schedule(Mode.RIDE_ALONG, Costs.uniform(1), MICRO_BATCHES))
    seconds = [stepper.time(context) for _ in range(job["rounds"])]
    gathers = _gather_seconds(engine.context.objective.context) if job["context"] > 1 else 0.0
    return [{"rounds": seconds, "gathers": gathers}]


def _gather_seconds(ranks: Any) -> float:
    """What the gathers of a step take by themselves, and the sums of their gradients."""
    import torch
    import torch.distributed as dist

    from megatron_slm.parallel.collectives import all_gather_dim0, reduce_scatter_dim0

    own = torch.randn(2, 1, SEQ_LENGTH // ranks.size, HEADS, WIDTH // HEADS)
    whole = all_gather_dim0(own, ranks)

    def seconds(collective: Any, x: torch.Tensor) -> float:
        found = []
        for _ in range(GATHERS_TIMED):
            dist.barrier()
            started = time.perf_counter()
            collective(x, ranks)
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    # of the reference once, of the model forwards and again backwards
    gather, scatter = seconds(all_gather_dim0, own), seconds(reduce_scatter_dim0, whole)
    return MICRO_BATCHES * BLOCKS * (3 * gather + scatter)


def _flags(job: dict[str, Any]) -> list[str]:
    values = {
        **emulation.input_flags(job["folder"]),
        "num-layers": BLOCKS,
        "hidden-size": WIDTH,
        "ffn-hidden-size": 2 * WIDTH,
        "num-attention-heads": HEADS,
        "seq-length": SEQ_LENGTH * job["context"] // 2,
        "context-parallel-size": job["context"],
        "micro-batch-size": 1,
        "global-batch-size": _batch_size(job),
        "train-iters": job["rounds"] * emulation.STEPS_A_ROUND,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _batch_size(job: dict[str, Any]) -> int:
    return MICRO_BATCHES * 2 // job["context"]  # type: ignore[no-any-return]


# ---- the report -------------------------------------------------------------------------------------------


def _record(half: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    expected = statistics.median(half["rounds"]) + cut["gathers"]
    ratios = [seconds / expected for seconds in cut["rounds"]]
    return {
        "context": 2,
        "half_step_seconds": round(statistics.median(half["rounds"]), 4),
        "gather_seconds": round(cut["gathers"], 4),
        "step_seconds": round(statistics.median(cut["rounds"]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "spread": round(emulation.quartile_distance(ratios), 4),
    }


def _markdown(record: dict[str, Any], arguments: argparse.Namespace, rounds: int) -> str:
    header = ("context-parallel ranks", "step, s", "half the sequence's, s", "gathers, s", "step / (half + gathers)")
    row = [
        str(record["context"]),
        f"{record['step_seconds']:.3f}",
        f"{record['half_step_seconds']:.3f}",
        f"{record['gather_seconds']:.3f}",
        f"{record['ratio']:.3f} ± {record['spread'] / 2:.3f}",
    ]
    return (
        f"# Context parallelism\n\n{report.environment()}; {rounds} rounds, emulated compute (unit "
        f"{arguments.unit_ms:g} ms), {MICRO_BATCHES} micro-batches of {SEQ_LENGTH} tokens. Made by `python "
        f"tools/benchmark.py context`.\n\n{' '.join((__doc__ or '').split())}\n\n" + report.table(header, [row])
    )
