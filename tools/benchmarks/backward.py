"""Step and backward time of training on sampled gradient rows, against plain training.

One process trains one model, all contenders in turn, round after round, each step between two of plain training
(CLM, every row). A step is some micro-batches, clipping and AdamW. A ratio is the median over rounds of a contender's
CPU time over the mean of the two plain steps' around it, its spread the distance between the quartiles; the backward
ratio is that of the backward passes alone. The losses that tokens are chosen by are the model's own, so that no
reference is timed. Memory is the peak of a process of its own, over that of plain training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report

_NAMES = ("num_layers", "hidden", "ffn", "heads", "groups", "length", "vocab", "samples", "micro_batches")
SHAPES = {
    True: dict(zip(_NAMES, (2, 64, 160, 4, 2, 64, 256, 2, 2), strict=True)),
    False: dict(zip(_NAMES, (4, 512, 1408, 8, 2, 512, 4096, 2, 4), strict=True)),
}
"""By --quick."""
WARM_UP = 20
"""Steps before timing where shares are controlled: they settle. Others take less."""
WARM_UP_OF_FIXED = 6
RETAIN = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Contender:
    """One way of training."""

    name: str
    keep: float
    rows: str = "exact"
    share: float | None = None
    variance: float | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of its backward pass."""
        given = {"backward-rows": self.rows, "backward-row-share": self.share, "backward-row-variance": self.variance}
        return {name: value for name, value in given.items() if value is not None}


PLAIN = Contender("plain", 1.0)
CONTENDERS = [
    Contender("exact", 0.6),
    Contender("sampled 0.02", 0.6, "sampled", variance=0.02),
    Contender("sampled 0.05", 0.6, "sampled", variance=0.05),
    *(Contender(f"sampled {share:g}", 0.6, "sampled", share) for share in (0.7, 0.65, 0.6)),
    Contender("kept", 0.6, "kept"),
    Contender("exact", 0.5),
    *(Contender(f"sampled {share:g}", 0.5, "sampled", share) for share in (0.6, 0.5)),
    Contender("kept", 0.5, "kept"),
    Contender("exact", 0.3),
    *(Contender(f"sampled {share:g}", 0.3, "sampled", share) for share in (0.5, 0.4)),
    Contender("kept", 0.3, "kept"),
]
QUICK = [CONTENDERS[i] for i in (0, 1, 3, 6)]
GOALS = {("sampled 0.02", 0.6): 0.80, ("sampled 0.6", 0.5): 0.74, ("sampled 0.4", 0.3): 0.63}
"""Step ratios that were hoped for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="a tiny model and keep 0.6, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default 7)")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    contenders = QUICK if arguments.quick else CONTENDERS
    job = {"quick": arguments.quick, "rounds": arguments.rounds}
    timed = _spawn({**job, "what": "time"}, RETAIN)
    peaks = [_spawn({**job, "what": "memory", "index": index}, RETURN)["bytes"] for index in range(len(contenders) + 1)]
    records = [
        {**record, "memory_ratio": round(peak / peaks[0], 3)} for record, peak in zip(timed, peaks[1:], strict=True)
    ]
    markdown = _markdown(records, arguments)
    report.write("backward", markdown, records, arguments.json)
    print(markdown)
    return 0


def _spawn(job: dict[str, Any], malloc: dict[str, str]) -> Any:
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "benchmark.py"), "backward"]
    environment = os.environ | malloc | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--child", json.dumps(job)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- one process ------------------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    shape = SHAPES[job["quick"]]
    contenders = [PLAIN, *(QUICK if job["quick"] else CONTENDERS)]
    if job["what"] == "memory":
        stepper = Stepper(shape, contenders[job["index"]])
        stepper.step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        stepper.step()
        return {"bytes": _peak_bytes()}
    steppers = [Stepper(shape, contender) for contender in contenders]
    for stepper in steppers:
        is_controlled = stepper.contender.variance is not None and not job["quick"]
        for _ in range(WARM_UP if is_controlled else WARM_UP_OF_FIXED):
            stepper.step()
    plain, others = steppers[0], steppers[1:]
    ratios: list[list[tuple[float, float]]] = [[] for _ in others]
    for number in range(job["rounds"]):
        before = plain.step()
        for found, stepper in zip(ratios, others, strict=True):
            mine, after = stepper.step(), plain.step()
            found.append(tuple(2 * x / (a + b) for x, a, b in zip(mine, before, after, strict=True)))  # type: ignore[arg-type]
            before = after
        sys.stderr.write(f"round {number + 1} of {job['rounds']}\n")
    return [stepper.record(found) for stepper, found in zip(others, ratios, strict=True)]


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Stepper:
    """A model that trains on random text by one contender's rule; the same model and text for all of them."""

    def __init__(self, shape: dict[str, int], contender: Contender) -> None:
        import torch

        from megatron_slm.config.architecture import Architecture
        from megatron_slm.config.backward import BackwardConfig
        from megatron_slm.engine.rows import RowSampler
        from megatron_slm.loss.objective import Objective
        from megatron_slm.model.llama import layer_list
        from megatron_slm.parallel.groups import TensorParallel
        from megatron_slm.parallel.layers import ParallelLayers
        from megatron_slm.selection.scores import score_named
        from megatron_slm.selection.selector import Selector

        self.shape, self.contender, self.number = shape, contender, 0
        arch = Architecture(
            num_layers=shape["num_layers"], hidden_size=shape["hidden"], ffn_hidden_size=shape["ffn"],
            num_attention_heads=shape["heads"], num_query_groups=shape["groups"],
            kv_channels=shape["hidden"] // shape["heads"], vocab_size=shape["vocab"],
        )  # fmt: skip
        torch.manual_seed(0)
        self.layers = [maker.make() for maker in layer_list(arch, ParallelLayers())]
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)
        scores = (score_named("loss"),) if contender.keep < 1.0 else ()
        selector = Selector(scores=scores, keep_ratio=contender.keep)
        self.objective = Objective(selector=selector, tp=TensorParallel())
        config = BackwardConfig(**{name.replace("-", "_"): value for name, value in contender.flags.items()})
        self.rows, self.shares = None, []
        if not config.is_exact:
            self.rows = RowSampler(
                config=config, selector=selector, seed=0, num_blocks=arch.num_layers, num_samples=shape["samples"],
                length=shape["length"], data_rank=0, data_size=1, counts_here=True,
            )  # fmt: skip
            self.shares = self.rows.first_shares([])

    def _batch(self) -> Any:
        """Text in which some tokens can be learned: runs of a fixed stride, with noise."""
        import torch

        from megatron_slm.types import MicroBatch

        generator = torch.Generator().manual_seed(self.number)
        samples, length, vocab = (self.shape[name] for name in ("samples", "length", "vocab"))
        start = torch.randint(vocab, (samples, 1), generator=generator)
        tokens = (start + 3 * torch.arange(length + 1)) % vocab
        noise = torch.randint(vocab, tokens.shape, generator=generator)
        tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.3, noise, tokens)
        valid = torch.ones(samples, length, dtype=torch.bool)
        return MicroBatch(tokens[:, :-1], tokens[:, 1:], valid, torch.arange(samples))

    def step(self) -> tuple[float, float]:
        """CPU seconds of a step, and of its backward passes."""
        import torch

        from megatron_slm.engine.module import output_rows, run_layers
        from megatron_slm.loss.objective import StepSettings

        settings = StepSettings(step=self.number // self.shape["micro_batches"], row_shares=tuple(self.shares))
        started, backward_seconds = time.process_time(), 0.0
        for number in range(self.shape["micro_batches"]):
            batch = self._batch()
            self.number += 1
            rows = None if self.rows is None else self.rows.of_micro_batch(number, settings)
            x_sbd = run_layers(self.layers, batch.tokens_bs, None, rows=rows)
            weight = output_rows(self.layers[-1], self.layers[-1].output)
            loss, sums = self.objective.loss(x_sbd, weight, batch, None, settings)
            loss /= self.objective.sum_layout.unpack(sums).kept_tokens * self.shape["micro_batches"]
            backward = time.process_time()
            loss.backward()
            backward_seconds += time.process_time() - backward
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rows is not None:
            self.rows.read(self.rows.take_table(torch.device("cpu")).tolist())
            self.shares = self.rows.next_shares(self.shares, self.rows.last)
        return time.process_time() - started, backward_seconds

    def record(self, ratios: list[tuple[float, float]]) -> dict[str, Any]:
        """What was measured, for the JSON."""
        from megatron_slm.telemetry.metrics import row_metrics

        steps, backwards = zip(*ratios, strict=True)
        quartiles = statistics.quantiles(steps, n=4) if len(steps) > 1 else [steps[0]] * 3
        measured = row_metrics(None if self.rows is None else self.rows.last)
        share, variance = measured["backward_row_share"], measured["backward_added_variance"]
        return {
            "name": self.contender.name,
            "keep": self.contender.keep,
            "share": round(1.0 if share is None else share, 4),
            "step_ratio": round(statistics.median(steps), 4),
            "spread": round(quartiles[2] - quartiles[0], 4),
            "backward_ratio": round(statistics.median(backwards), 4),
            "variance": None if variance is None else round(variance, 4),
        }


def _markdown(records: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    shape = SHAPES[arguments.quick]
    rows = [
        [
            record["name"],
            f"{record['keep']:g}",
            f"{record['share']:.2f}",
            f"{record['step_ratio']:.3f} ± {record['spread'] / 2:.3f}",
            f"{GOALS[goal]:.2f}" if (goal := (record["name"], record["keep"])) in GOALS else "",
            f"{record['backward_ratio']:.3f}",
            f"{record['memory_ratio']:.2f}",
            "" if record["variance"] is None else f"{record['variance']:.3f}",
        ]
        for record in records
    ]
    header = (
        "backward rows",
        "keep",
        "share",
        "step / plain",
        "goal",
        "backward / plain",
        "memory / plain",
        "variance",
    )
    return (
        "# The backward pass on some of the rows\n\n"
        f"{report.environment()}, one thread; {shape['num_layers']} layers, hidden size {shape['hidden']}, "
        f"{shape['groups']} key/value groups of {shape['heads']} heads, {shape['micro_batches']} micro-batches of "
        f"{shape['samples']} x {shape['length']} tokens, vocabulary {shape['vocab']:,}, fp32; {arguments.rounds} "
        "rounds. CPU time of a step (forward, selection, backward, "
        "AdamW) over that of plain training on all tokens, in one process in turn; `sampled 0.02` follows that "
        "variance, `sampled 0.7` has that share. Made by `python tools/benchmark.py backward`. What the columns mean: "
        "[row-sampling.md](../row-sampling.md).\n\n" + report.table(header, rows)
    )
