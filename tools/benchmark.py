#!/usr/bin/env python3
"""Measure, never assert: `python tools/benchmark.py NAME [--quick] [--json FILE]`; reports are in docs/benchmarks/."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command

BENCHMARKS = {
    "backward": ("backward", "training on sampled rows of the gradient against plain training"),
    "checkpoint": ("checkpoint", "how long training stands still for a save, synchronous and asynchronous"),
    "context": ("context", "sequences cut over two ranks against samples of half the length"),
    "data": ("data", "preprocessing against Hugging Face and Megatron's way of sharing work"),
    "data-loading": ("data_loading", "indices, blends' orders and micro-batches of large corpora"),
    "gpu-model": ("gpu_model", "a step's speed on given GPUs, modelled without one"),
    "loss-head": ("loss_head", "the loss against full logits and other libraries' losses"),
    "scale": ("scale", "one rank of up to 1,024, simulated: process groups, memory, files, collectives"),
    "pipeline": ("pipeline", "the reference's schedules against plain training"),
    "weak-scaling": ("weak_scaling", "efficiency of layouts of one to eight ranks whose work grows with them"),
}


def main() -> int:
    """Run the command; return its exit code."""
    return run_command(_run)


def _run(words: Sequence[str]) -> int:
    """Run the benchmark that is named."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    parser = ToolParser(__doc__)
    subparsers = parser.add_subparsers(dest="benchmark", required=True)
    modules = {}
    for name, (module, text) in BENCHMARKS.items():
        modules[name] = importlib.import_module(f"benchmarks.{module}")
        modules[name].add_arguments(subparsers.add_parser(name, help=text, description=modules[name].__doc__))
    arguments = parser.parse_args(words)
    return modules[arguments.benchmark].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
