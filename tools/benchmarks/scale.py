"""What one rank of up to 1,024 does at its start and in a step: process groups, host memory, files, collectives.

Each rank is simulated by a process of its own (`simulated_rank.py`), which runs the project's own `prepare` and
`train`. Counts are exact; seconds are of this machine, without what a network would add. A tensor below four million
numbers is drawn whole, one after the other, and cut: in models of a few thousand parameters that shows in the bytes a
parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import report

VOCAB_SIZE, SEQ_LENGTH = 256, 64
HEADS = 8
MEASURED_BYTES = 20_000_000
"""Least number of parameters of a rank whose host memory is reported: of fewer, the rest of the process says more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One simulated rank."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    rank: int = 0
    """Negative: from the end."""
    hidden_size: int = 64
    layers_per_stage: int = 2
    vocab_size: int = VOCAB_SIZE
    zero_stage: int = 1
    reference: bool = True
    steps: int = 0
    """Steps to train."""
    saved_at: tuple[int, int, int] | None = None
    """Tensor, pipeline and data sizes of a checkpoint to resume from."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def num_layers(self) -> int:
        """Number of the model's blocks."""
        return self.layers_per_stage * self.pipeline


CASES = (
    Case(name="T8 P4 D2", tensor=8, pipeline=4, data=2, rank=20, steps=0),
    Case(name="T8 P4 D32", tensor=8, pipeline=4, data=32, rank=300),
    Case(name="T8 P4 D32, last stage, 3 steps", tensor=8, pipeline=4, data=32, rank=-1, steps=3),
    Case(name="T4 P8 D32", tensor=4, pipeline=8, data=32, rank=300),
    Case(name="T2 P16 D32", tensor=2, pipeline=16, data=32, rank=300),
    Case(name="D1024, ZeRO-1", data=1024, rank=300, layers_per_stage=4, reference=False),
    Case(name="D1024, ZeRO-3", data=1024, rank=300, layers_per_stage=4, zero_stage=3, reference=False),
    Case(name="D64, 84M parameters, ZeRO-1", data=64, hidden_size=1024, layers_per_stage=8, reference=False),
    Case(name="D64, 84M parameters, ZeRO-3", data=64, hidden_size=1024, layers_per_stage=8, zero_stage=3,
         reference=False),
    Case(name="resume at 64 ranks", tensor=8, pipeline=4, data=2, rank=20, reference=False, saved_at=(8, 4, 2)),
    Case(name="resume at 512 ranks", tensor=8, pipeline=4, data=16, rank=300, reference=False, saved_at=(8, 4, 16)),
    Case(name="resume at 1,024 ranks", tensor=8, pipeline=4, data=32, rank=300, reference=False, saved_at=(8, 4, 32)),
    Case(name="resume 512 ranks' checkpoint at 64", tensor=8, pipeline=4, data=2, rank=20, reference=False,
         saved_at=(8, 4, 16)),
)  # fmt: skip
QUICK = ("T8 P4 D2", "T8 P4 D32", "resume at 64 ranks")


def prepare_files(case: Case, folder: Path) -> None:
    """Write the corpus and the checkpoints that a case reads, in `folder`."""
    import numpy as np

    from benchmarks.synthetic_checkpoint import write_checkpoint
    from megatron_slm.config.architecture import Architecture
    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
    from megatron_slm.parallel.topology import Topology

    folder.mkdir(parents=True, exist_ok=True)
    with IndexedCorpusWriter(folder / "corpus", np.uint16) as writer:
        for start in range(64):
            writer.add_document(((np.arange(2000) * 7 + start) % 250).astype(np.uint16))
    arch = Architecture(
        num_layers=case.num_layers, hidden_size=case.hidden_size, ffn_hidden_size=2 * case.hidden_size,
        num_attention_heads=HEADS, num_query_groups=HEADS, kv_channels=case.hidden_size // HEADS,
        vocab_size=case.vocab_size,
    )  # fmt: skip
    if case.reference:
        write_checkpoint(folder / "reference", arch, Topology(), divisible_by=128, with_moments=False)
    if case.saved_at is not None:
        tensor, pipeline, data = case.saved_at
        topology = Topology(tensor=tensor, pipeline=pipeline, data=data)
        write_checkpoint(folder / "saved", arch, topology, divisible_by=128)


def simulate(case: Case, folder: Path, heard: list[Any] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Run one rank in this process, which can do nothing else afterwards.

    Args:
        heard: what rank 0 has told all ranks.

    Returns:
        Its record, and what it would have told the others as rank 0.
    """
    import torch

    from benchmarks.simulated_rank import FileOpens, SimulatedRank, import_what_engines_need, peak_host_bytes
    from benchmarks.tensor_bytes import Peak

    torch.set_num_threads(1)
    rank = case.rank % case.world_size
    simulated = SimulatedRank(rank, case.world_size, heard)
    from megatron_slm.flags.load import parse
    from megatron_slm.training import loop
    from megatron_slm.training.pretrain import prepare

    opens = FileOpens(folder / "saved")
    config, _ = parse(_flags(case, folder, rank))
    import_what_engines_need()
    tensors, layers = Peak(), [0]
    started = time.perf_counter()
    with peak_host_bytes() as peak, tensors, before_engines(lambda: layers.append(tensors.peak_bytes)):
        run = prepare(config)
    seconds = time.perf_counter() - started
    held, shared = _parameters(run.trainer)
    num_parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in held)
    share = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in held) + shared
    record = {
        "name": case.name,
        "layout": [case.tensor, case.pipeline, case.data],
        "rank": rank,
        "parameters": num_parameters,
        "new_groups": simulated.new_groups,
        "nocolor_splits": simulated.nocolor_splits,
        "layer_bytes_per_parameter": layers[-1] / share,
        "build_bytes_per_parameter": peak() / num_parameters if num_parameters >= MEASURED_BYTES else None,
        "file_opens": opens.count,
        "collectives_at_start": simulated.collectives,
        "collectives_per_step": None,
        "seconds": seconds,
    }
    if case.steps:
        at_step: list[int] = []
        real = loop.train_step

        def counting(*args: Any, **kwargs: Any) -> Any:
            at_step.append(simulated.collectives)
            return real(*args, **kwargs)

        loop.train_step = counting
        loop.train(run)
        record["collectives_per_step"] = at_step[-1] - at_step[-2]
    opens.stop()
    return record, simulated.said


@contextlib.contextmanager
def before_engines(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` when a rank's layers are there, model and reference, and DeepSpeed's engine is made next."""
    from megatron_slm.training import build

    with contextlib.ExitStack() as stack:
        for module, name in ((build, "pipeline_engine"), (build.deepspeed, "initialize")):
            real = getattr(module, name)

            def noted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                note()
                return real(*args, **kwargs)

            setattr(module, name, noted)
            stack.callback(setattr, module, name, real)
        yield


def _parameters(trainer: Any) -> tuple[list[Any], int]:
    """Return the model's parameters on a rank, and the number of the reference's elements there."""
    reference = getattr(trainer, "reference", None) or getattr(
        getattr(trainer.engine, "context", None), "reference", None
    )
    held = list(trainer.engine.module.parameters())
    if reference is None:
        return held, 0
    if reference.shared is not None:
        return held, reference.shared.num_elements
    return held, sum(p.numel() for p in reference.parameters())


def _flags(case: Case, folder: Path, rank: int) -> list[str]:
    name = f"zero{case.zero_stage}_bf16{'_pipeline' * (case.zero_stage == 1)}.json"
    values: dict[str, Any] = {
        "num-layers": case.num_layers,
        "hidden-size": case.hidden_size,
        "ffn-hidden-size": 2 * case.hidden_size,
        "num-attention-heads": HEADS,
        "data-path": folder / "corpus",
        "split": 100,
        "run-dir": folder / f"run-{rank}",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": case.vocab_size - 1,
        "seq-length": SEQ_LENGTH,
        "tensor-model-parallel-size": case.tensor,
        "pipeline-model-parallel-size": case.pipeline,
        "deepspeed-config": Path(__file__).resolve().parents[2] / "ds_configs" / name,
        "micro-batch-size": 1,
        "global-batch-size": 2 * case.pipeline * case.data,
        "train-iters": max(case.steps, 4),
        "lr": 1e-4,
        "watchdog-factor": 0,
    }
    bare = ["--bf16"]
    if case.tensor > 1:
        bare.append("--sequence-parallel")
    if case.reference:
        values |= {"objective": "slm", "reference-load": folder / "reference"}
    else:
        values["objective"] = "clm"
    if case.saved_at is not None:
        values["load"] = folder / "saved"
        bare.append("--accept-new-sample-order")
    return [*bare, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def in_a_process(function: Any, *arguments: Any) -> Any:
    """Return what a call returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} failed; its error is above") from None
    finally:
        process.join()


def _send(sender: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--only", metavar="TEXT", help="only the cases with this in their name")


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    records = []
    for case in CASES:
        if (arguments.quick and case.name not in QUICK) or (arguments.only or "") not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(prepare_files, case, Path(folder))
            heard = None
            if case.saved_at is not None:
                _, heard = in_a_process(simulate, dataclasses.replace(case, rank=0), Path(folder))
            records.append(in_a_process(simulate, case, Path(folder), heard)[0])
        print(json.dumps(records[-1]), file=sys.stderr)
    report.write("scale", _markdown(records), records, arguments.json)
    return 0


def _markdown(records: list[dict[str, Any]]) -> str:
    columns = {
        "new_groups": "groups created",
        "nocolor_splits": "splits for others",
        "file_opens": "checkpoint files opened",
        "layer_bytes_per_parameter": "bytes of layers a parameter of the share",
        "build_bytes_per_parameter": "bytes a parameter with the engine",
        "collectives_at_start": "collectives at start",
        "collectives_per_step": "collectives a step",
        "seconds": "seconds to build",
    }

    def text(value: Any) -> str:
        return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"

    rows = [[r["name"], str(r["rank"]), *(text(r[name]) for name in columns)] for r in records]
    return (
        "# One rank of a large world\n\n"
        f"`python tools/benchmark.py scale`; {report.environment()}. {' '.join((__doc__ or '').split())}\n\n"
        + report.table(["case", "rank", *columns.values()], rows)
    )
