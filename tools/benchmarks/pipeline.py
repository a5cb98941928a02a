"""Step time of the reference's schedules against plain training, beside what the simulator predicts.

All modes take turns on one engine in one world of processes, round after round; a ratio is the median over rounds of
mode / CLM in the same round, its spread the distance between the quartiles. Emulated compute: the model is tiny, and
every computation is slept out to its length (forward 1, backward 2, reference 1 unit), so that the engine and its
messages are real while the cores stay free. Real compute: model and reference of one size, one thread a process; the
predictions are made from costs measured in the first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import emulation, report, world

EMULATED = [(2, 4), (2, 8), (4, 8), (4, 16)]
REAL = [(2, 4)]
MODES = ("ride-along", "sequential", "bubble", "skewed")
BASELINE, STORED = "clm", "stored scores"
SKEWED_ROWS, STORED_ROWS = "skewed-rows", "stored scores + rows"
ROW_SHARE = 0.65
EMULATED_BACKWARD_SHARE = 0.68
"""Of a backward pass, what ROW_SHARE of the rows leave in a model of usual shape: keys' and values' projections and
attention's own products stay."""
SEQ_LENGTH = {True: 8, False: 256}
WIDTH = {True: 16, False: 512}
MEASURED_STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    emulation.add_flags(parser, quick="2 stages, 4 micro-batches, emulated", unit_ms=30.0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    cases = [(case, True) for case in (EMULATED[:1] if arguments.quick else EMULATED)]
    cases += [] if arguments.quick else [(case, False) for case in REAL]
    records: list[dict[str, Any]] = []
    for (stages, micro_batches), emulated in cases:
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "stages": stages,
                "micro_batches": micro_batches,
                "emulated": emulated,
                "rounds": arguments.rounds,
                "unit_seconds": arguments.unit_ms / 1000,
                "folder": folder,
            }
            _prepare(Path(folder), emulated=emulated)
            _store_scores(job)
            records += world.run("pipeline", job, num_ranks=stages)
    markdown = _markdown(records, arguments)
    report.write("pipeline", markdown, records, arguments.json)
    print(markdown)
    return 0


# ---- the world of processes -------------------------------------------------------------------------------


def _prepare(folder: Path, *, emulated: bool) -> None:
    """A corpus of random tokens, and a reference as large as the model."""
    width = WIDTH[emulated]
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    emulation.write_inputs(folder, seq_length=SEQ_LENGTH[emulated], shape=shape)


def _store_scores(job: dict[str, Any]) -> None:
    """What the reference says of all samples that will be drawn, in one process."""
    tool = Path(__file__).resolve().parents[1] / "score_corpus.py"
    flags = [*_flags({**job, "stages": 1}), "--output", f"{job['folder']}/scores"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, str(tool), *flags], env=environment, check=True, stdout=subprocess.DEVNULL)


# ---- one process of it ------------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    run_ = emulation.built_run(_flags(job))
    engine = run_.trainer.engine
    stepper = emulation.Stepper(engine, run_.train_source.micro_batch, batch_size=job["micro_batches"])
    costs = _costs(job, stepper)
    contexts = _contenders(engine.context, costs, job)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(job["rounds"]):
        for name, context in contexts.items():
            seconds[name].append(stepper.time(context))
    dist.barrier()
    return [_record(job, name, context, seconds) for name, context in contexts.items()]


def _flags(job: dict[str, Any]) -> list[str]:
    folder, width = job["folder"], WIDTH[job["emulated"]]
    values = {
        **emulation.input_flags(folder),
        "num-layers": 4,
        "hidden-size": width,
        "ffn-hidden-size": 2 * width,
        "num-attention-heads": 4,
        "seq-length": SEQ_LENGTH[job["emulated"]],
        "pipeline-model-parallel-size": job["stages"],
        "micro-batch-size": 1,
        "global-batch-size": job["micro_batches"],
        "train-iters": MEASURED_STEPS + 2 + job["rounds"] * (len(MODES) + 4) * emulation.STEPS_A_ROUND,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _costs(job: dict[str, Any], stepper: emulation.Stepper) -> Any:
    from megatron_slm.engine.schedule.costs import Costs, Work

    if not job["emulated"]:
        return _measured_costs(stepper)
    engine, unit = stepper.engine, job["unit_seconds"]
    lengths = {Work.FORWARD: unit, Work.BACKWARD: 2 * unit, Work.REFERENCE: unit}

    def seconds_of(work: Work) -> float:
        sampled = work is Work.BACKWARD and engine.context.rows is not None
        return lengths[work] * (EMULATED_BACKWARD_SHARE if sampled else 1.0)

    engine._timing = emulation.slept_out(seconds_of)
    return Costs.uniform(job["stages"])


def _measured_costs(stepper: emulation.Stepper) -> Any:
    """What each computation takes on each stage."""
    from megatron_slm.engine.measure import measured_costs

    stepper.take(is_last=False)  # the first is slower
    context = stepper.engine.context
    context.timers.keep_intervals()
    for step in range(MEASURED_STEPS):
        stepper.take(is_last=step == MEASURED_STEPS - 1)
    return measured_costs(context.timers.take_intervals(), context.topology, stepper.engine.device)


def _contenders(context: Any, costs: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What takes turns, each by what the engine works with: its schedule, and where reference losses come from."""
    from megatron_slm.engine.schedule.modes import Mode
    from megatron_slm.engine.schedule.search import choose_schedule
    from megatron_slm.reference.manifest import StoreManifest
    from megatron_slm.reference.store import ScoreReader
    from megatron_slm.reference.stored import StoredScores

    alone = replace(context, schedule=choose_schedule(Mode.CLM, costs, job["micro_batches"]))
    found = {BASELINE: emulation.without_reference(context, costs, job["micro_batches"])}
    for mode in MODES:
        found[mode] = replace(context, schedule=choose_schedule(Mode(mode), costs, job["micro_batches"]))
    folder = Path(job["folder"]) / "scores"
    stored = StoredScores([ScoreReader(folder, StoreManifest.read(folder))], "mean")
    found[STORED] = replace(alone, scores=stored)
    with_rows, rows = _rows_costs(costs, job), _row_sampler(context, job)
    found[SKEWED_ROWS] = replace(
        context, schedule=choose_schedule(Mode.SKEWED, with_rows, job["micro_batches"]), rows=rows
    )
    after = choose_schedule(Mode.CLM, with_rows, job["micro_batches"])
    return found | {STORED_ROWS: replace(alone, schedule=after, scores=stored, rows=rows)}


def _rows_costs(costs: Any, job: dict[str, Any]) -> Any:
    """Costs with a backward pass on ROW_SHARE of the rows."""
    shorter = tuple(round(_backward_share(job) * ticks) for ticks in costs.backward)
    return replace(costs, backward=shorter, exact_backward=costs.backward)


def _backward_share(job: dict[str, Any]) -> float:
    """Length of a backward pass on ROW_SHARE of the rows over that on all."""
    from megatron_slm.engine.schedule.costs import backward_passes

    if job["emulated"]:
        return EMULATED_BACKWARD_SHARE
    return backward_passes(_architecture(job), SEQ_LENGTH[False], row_share=ROW_SHARE) / 2


def _architecture(job: dict[str, Any]) -> Any:
    from megatron_slm.config.architecture import Architecture

    width = WIDTH[job["emulated"]]
    return Architecture(
        num_layers=4,
        hidden_size=width,
        ffn_hidden_size=2 * width,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=width // 4,
        vocab_size=emulation.VOCAB_SIZE,
    )


def _row_sampler(context: Any, job: dict[str, Any]) -> Any:
    from megatron_slm.config.backward import BackwardConfig
    from megatron_slm.engine.rows import RowSampler

    return RowSampler(
        config=BackwardConfig(backward_rows="sampled", backward_row_share=ROW_SHARE),
        selector=context.objective.selector,
        seed=0,
        num_blocks=4,
        num_samples=1,
        length=SEQ_LENGTH[job["emulated"]],
        data_rank=0,
        data_size=1,
        counts_here=True,
    )


def _record(job: dict[str, Any], name: str, context: Any, seconds: dict[str, list[float]]) -> dict[str, Any]:
    from megatron_slm.engine.schedule.simulate import Simulation

    simulation = Simulation(context.schedule)
    ratios = [mine / clm for mine, clm in zip(seconds[name], seconds[BASELINE], strict=True)]
    return {
        "mode": name,
        "stages": job["stages"],
        "micro_batches": job["micro_batches"],
        "emulated": job["emulated"],
        "ratio": round(statistics.median(ratios), 4),
        "predicted": round(simulation.ratio, 4),
        "lower_bound": round(simulation.lower_bound, 4),
        "spread": round(emulation.quartile_distance(ratios), 4),
        "step_seconds": round(statistics.median(seconds[name]), 4),
    }


def _markdown(records: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    text = (
        "# The reference's schedules\n\n"
        f"{report.environment()}; {arguments.rounds} rounds, reference as large as the model. Step time over CLM's, "
        "which the same engine runs without a reference. Made by `python tools/benchmark.py pipeline`.\n"
    )
    for emulated in (True, False):
        rows = [
            [
                record["mode"],
                str(record["stages"]),
                str(record["micro_batches"]),
                f"{record['ratio']:.3f} ± {record['spread'] / 2:.3f}",
                f"{record['predicted']:.3f}",
                f"{record['lower_bound']:.3f}",
                f"{record['step_seconds']:.3f}",
            ]
            for record in records
            if record["emulated"] == emulated
        ]
        if rows:
            kind = f"Compute emulated by sleeping (unit {arguments.unit_ms:g} ms)" if emulated else "Real compute"
            text += f"\n## {kind}\n\n"
            header = ("mode", "stages", "micro-batches", "step / CLM's", "predicted", "lower bound", "step, s")
            text += report.table(header, rows)
    return text
