"""Efficiency of data, pipeline and tensor parallelism as the work grows with the ranks, on one to eight of them.

Every rank has the same work at every layout: data-parallel ranks bring samples of their own, stages layers of their
own, tensor-parallel ranks heads and feed-forward columns of their own. Efficiency is one rank's step time over the
layout's. Computations are slept out (forward 1, backward 2, reference 1 unit), so that eight processes need no eight
cores, and what is lost is what the system adds: the pipeline's bubble, messages, collectives, the optimizer's step,
and work of the processes that wait for a core of this machine. The bubble follows from the schedule: the bound is the
efficiency that the simulated schedule has, in which all but computations is free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import emulation, report, world

SEQ_LENGTH, WIDTH, HEAD_WIDTH = 8, 16, 16
MICRO_BATCHES = 8


@dataclass(frozen=True)
class Sizes:
    """A layout: the numbers of tensor-parallel ranks, of stages, and of data-parallel ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """Its axes of more than one rank, like `T2 P4`."""
        axes = {"T": self.tensor, "P": self.pipeline, "D": self.data}
        return " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) or "one rank"


ONE = Sizes()
LAYOUTS = (
    ONE,
    *(Sizes(data=size) for size in (2, 4, 8)),
    *(Sizes(pipeline=size) for size in (2, 4, 8)),
    *(Sizes(tensor=size) for size in (2, 4, 8)),
    Sizes(pipeline=2, data=4),
    Sizes(pipeline=4, data=2),
    Sizes(tensor=2, pipeline=2, data=2),
)
QUICK = (ONE, Sizes(data=2), Sizes(pipeline=2), Sizes(tensor=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    emulation.add_flags(parser, quick="one and two ranks", unit_ms=20.0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    found: list[dict[str, Any]] = []
    for sizes in QUICK if arguments.quick else LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            emulation.write_inputs(Path(folder), seq_length=SEQ_LENGTH, shape=_shape(sizes))
            job = {
                "layout": [sizes.tensor, sizes.pipeline, sizes.data],
                "rounds": arguments.rounds,
                "unit_seconds": arguments.unit_ms / 1000,
                "folder": folder,
            }
            found += world.run("weak-scaling", job, num_ranks=sizes.num_ranks)
        print(json.dumps(found[-1]), file=sys.stderr)
    records = _records(found)
    markdown = _markdown(records, arguments)
    report.write("weak-scaling", markdown, records, arguments.json)
    print(markdown)
    return 0


def _shape(sizes: Sizes) -> dict[str, int]:
    """Fields of the `LlamaConfig`: a block a stage, a head and WIDTH columns a tensor-parallel rank."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH * sizes.tensor,
        "num_hidden_layers": sizes.pipeline,
        "num_attention_heads": sizes.tensor,
        "num_key_value_heads": sizes.tensor,
        "head_dim": HEAD_WIDTH,
    }


# ---- one process of a world --------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    from megatron_slm.engine.schedule.costs import Costs, Work
    from megatron_slm.engine.schedule.modes import Mode
    from megatron_slm.engine.schedule.search import choose_schedule
    from megatron_slm.engine.schedule.simulate import Simulation

    sizes = Sizes(*job["layout"])
    run_ = emulation.built_run(_flags(job, sizes))
    engine, unit, stopwatch = run_.trainer.engine, job["unit_seconds"], emulation.Stopwatch()
    lengths = {Work.FORWARD: unit, Work.BACKWARD: 2 * unit, Work.REFERENCE: unit}
    engine._timing = emulation.slept_out(lengths.__getitem__, stopwatch)
    stopwatch.watch()
    stepper = emulation.Stepper(engine, run_.train_source.micro_batch, batch_size=MICRO_BATCHES * sizes.data)
    costs = Costs.uniform(sizes.pipeline)
    mode = Mode.of_run("skewed", num_stages=sizes.pipeline, has_reference=True)
    contexts = {
        False: emulation.without_reference(engine.context, costs, MICRO_BATCHES),
        True: replace(engine.context, schedule=choose_schedule(mode, costs, MICRO_BATCHES)),
    }
    seconds: dict[bool, list[float]] = {reference: [] for reference in contexts}
    for _ in range(job["rounds"]):
        for reference, context in contexts.items():
            seconds[reference].append(stepper.time(context))
    dist.barrier()
    return [
        {
            "name": sizes.name,
            "layout": job["layout"],
            "ranks": sizes.num_ranks,
            "reference": reference,
            "rounds": seconds[reference],
            "ticks": Simulation(context.schedule).step_ticks,
        }
        for reference, context in contexts.items()
    ]


def _flags(job: dict[str, Any], sizes: Sizes) -> list[str]:
    values = {
        **emulation.input_flags(job["folder"]),
        "num-layers": sizes.pipeline,
        "hidden-size": WIDTH,
        "ffn-hidden-size": WIDTH * sizes.tensor,
        "num-attention-heads": sizes.tensor,
        "kv-channels": HEAD_WIDTH,
        "seq-length": SEQ_LENGTH,
        "tensor-model-parallel-size": sizes.tensor,
        "pipeline-model-parallel-size": sizes.pipeline,
        "micro-batch-size": 1,
        "global-batch-size": MICRO_BATCHES * sizes.data,
        "train-iters": 2 * job["rounds"] * emulation.STEPS_A_ROUND,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--sequence-parallel"] if sizes.tensor > 1 else words


# ---- the report -------------------------------------------------------------------------------------------


def _records(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a layout, with and without a reference; each is compared with one rank's of the same."""
    alone = {measured["reference"]: measured for measured in found if measured["ranks"] == 1}
    records = []
    for measured in found:
        one = alone[measured["reference"]]
        one_step, step = statistics.median(one["rounds"]), statistics.median(measured["rounds"])
        efficiency, bound = one_step / step, one["ticks"] / measured["ticks"]
        spread = emulation.quartile_distance([one_step / seconds for seconds in measured["rounds"]])
        records.append(
            {
                **{name: measured[name] for name in ("name", "layout", "ranks", "reference")},
                "step_seconds": round(step, 4),
                "efficiency": round(efficiency, 4),
                "spread": round(spread, 4),
                "bound": round(bound, 4),
                "efficiency_over_bound": round(efficiency / bound, 4),
            }
        )
    return records


def _markdown(records: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    text = (
        f"# Weak scaling\n\n{report.environment()}; {arguments.rounds} rounds, emulated compute (unit "
        f"{arguments.unit_ms:g} ms), {MICRO_BATCHES} micro-batches a data-parallel rank, reference as large as the "
        "model. Made by `python tools/benchmark.py weak-scaling`.\n\n"
        f"{' '.join((__doc__ or '').split())}\n\n"
        "Up to eight processes share the cores named above and send through gloo on one machine: the figures show how "
        "the system's own work grows with the ranks, not the speed of a network or of a GPU. Tensor-parallel ranks "
        "meet several times in each block, and whoever waits there for a process that waits for a core is counted: "
        "their efficiency is this machine's, not that of ranks with a device each.\n"
    )
    for reference in (False, True):
        rows = [
            [
                record["name"],
                str(record["ranks"]),
                f"{record['step_seconds']:.3f}",
                f"{record['efficiency']:.3f} ± {record['spread'] / 2:.3f}",
                f"{record['bound']:.3f}",
                f"{record['efficiency_over_bound']:.3f}",
            ]
            for record in records
            if record["reference"] == reference
        ]
        text += "\n## With a reference\n\n" if reference else "\n## Plain training\n\n"
        header = ("layout", "ranks", "step, s", "efficiency", "bound", "efficiency / bound")
        text += report.table(header, rows)
    return text
