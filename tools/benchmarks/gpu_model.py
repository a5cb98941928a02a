"""Speed of a step on given GPUs, modelled: the real code runs on a device without values, and each kernel is costed.

A kernel takes the longest of: its FLOPs at the rate that products or attention reach, its bytes at the rate that memory
reaches, and a launch. A step is as long as its micro-batches on one GPU, or on the last stage of an evenly cut
pipeline, around which the pipeline fills and empties once; the reference rides along. Where blocks are compiled (the
default on a GPU) or only their element-wise work (the default where blocks cannot be), each norm, rotation and gated
activation is one kernel that reads its inputs and writes its results; more that the compiler fuses is not counted. The
loss head is also given over its products: its time, the reference's included, over that of one product for each token
that a model scores and two for each kept one. Nothing here was measured on a GPU; the rates are assumptions
(`megatron_slm/planning/roofline.py`), and the result is uncertain by 15 to 20 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "arch": {"num_layers": 22, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 32,
                 "num_query_groups": 4, "kv_channels": 64, "vocab_size": 32000},
        "length": 2048, "samples": 8, "stages": 1, "micro_batches": 8, "keep": 0.6,
    },
    "7b": {
        "arch": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
                 "num_query_groups": 8, "kv_channels": 128, "vocab_size": 32000},
        "length": 4096, "samples": 1, "stages": 4, "micro_batches": 128, "keep": 0.7,
    },
    "70b": {
        "arch": {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64,
                 "num_query_groups": 8, "kv_channels": 128, "vocab_size": 128256},
        "length": 4096, "samples": 1, "stages": 16, "micro_batches": 128, "keep": 0.6,
    },
}  # fmt: skip
"""Models in the layouts that are modelled: samples of a micro-batch, pipeline stages, micro-batches of a step."""
LAUNCH_SECONDS = 2.2e-6
OPTIMIZER_BYTES = 32
"""Read and written for each parameter at a step's end, on a GPU that shares them with no other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpu", default="h100", help="of the planner's GPUs (default h100)")


def run(arguments: argparse.Namespace) -> int:
    """Model each in a process of its own, which loads the fake device before torch."""
    from benchmarks import report

    records: list[dict[str, Any]] = []
    for name in arguments.models:
        command = [sys.executable, str(Path(__file__).resolve()), arguments.gpu, name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr[-3000:])
            return 1
        records += json.loads(done.stdout)
    rows = [
        [
            r["name"],
            r["gpu"],
            r["objective"],
            r["blocks"],
            f"{r['mfu']:.1%}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['head_over_products']:.2f}",
            _parts(r["by_part"]),
        ]
        for r in records
    ]
    header = [
        "model", "GPU", "objective", "blocks", "MFU", "tokens/s a GPU", "head over products",
        "ms of a micro-batch on the last stage",
    ]  # fmt: skip
    text = f"# Speed on GPUs, modelled\n\n{__doc__}\n" + report.table(header, rows)
    print(text)
    report.write("gpu-model", text, records, arguments.json)
    return 0


def _parts(by_part: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in by_part.items())


# ---- in the process with the fake device -------------------------------------------------------------------------


def model(name: str, gpu_name: str) -> list[dict[str, Any]]:
    """The records of one model, for plain and for selective training."""
    from megatron_slm.config.architecture import Architecture
    from megatron_slm.engine.schedule.costs import training_flops
    from megatron_slm.planning.gpus import GPUS
    from megatron_slm.planning.roofline import GRADIENT_SUM_BYTES, MEMORY_RATE

    setting, gpu = MODELS[name], GPUS[gpu_name]
    arch = Architecture(**setting["arch"])
    tokens = setting["samples"] * setting["length"]
    counts = _counted(arch, setting)
    layers = arch.num_layers // setting["stages"]
    table = arch.hidden_size * arch.vocab_size
    parameters = 2 * table + arch.num_layers * counts["block parameters"]
    on_last_stage = layers * counts["block parameters"] + (2 if setting["stages"] == 1 else 1) * table
    bandwidth = gpu.memory_bytes_per_second * MEMORY_RATE
    records = []
    for blocks, objective in itertools.product(("eager", "compiled"), ("clm", "slm")):
        parts: dict[str, float] = {}
        for part, launches in counts["blocks"][blocks].items():
            if part != "reference block" or objective == "slm":
                parts[part] = layers * sum(_seconds(launch, gpu) for launch in launches)
        for part, launches in counts["heads"][objective].items():
            parts[part] = sum(_seconds(launch, gpu) for launch in launches)
        parts["gradient sums"] = GRADIENT_SUM_BYTES * on_last_stage / bandwidth
        stage = sum(parts.values())
        fill = (setting["stages"] - 1) / setting["micro_batches"]
        update = OPTIMIZER_BYTES * parameters / setting["stages"] / bandwidth
        step = setting["micro_batches"] * stage * (1 + fill) + update
        rate = setting["micro_batches"] * tokens / step / setting["stages"]
        records.append({
            "name": name, "gpu": gpu_name, "objective": objective, "blocks": blocks,
            "mfu": rate * training_flops(arch, setting["length"]) / gpu.flops(bf16=True),
            "tokens_per_second": rate, "head_over_products": _over_products(parts, arch, setting, gpu),
            "by_part": parts, "modelled": True,
        })  # fmt: skip
    return records


def _over_products(parts: dict[str, float], arch: Any, setting: dict[str, Any], gpu: Any) -> float:
    """The loss head's time over that of the products it cannot do without."""
    from megatron_slm.planning.roofline import PRODUCT_RATE, head_backward, head_forward

    scored, kept = (2, setting["keep"]) if "reference head" in parts else (1, 1.0)
    products = scored * head_forward(arch, tensor=1).products
    products += kept * head_backward(arch, tensor=1, num_products=2).products
    floor = setting["samples"] * setting["length"] * products / (gpu.flops(bf16=True) * PRODUCT_RATE)
    return sum(seconds for part, seconds in parts.items() if "head" in part) / floor


def _seconds(launch: Any, gpu: Any) -> float:
    from megatron_slm.planning.roofline import ATTENTION_RATE, MEMORY_RATE, PRODUCT_RATE

    rate = gpu.flops(bf16=True) * (ATTENTION_RATE if "attention" in launch.op else PRODUCT_RATE)
    memory = launch.num_bytes / (gpu.memory_bytes_per_second * MEMORY_RATE)
    return max(launch.flops / rate, memory, LAUNCH_SECONDS)


def _counted(arch: Any, setting: dict[str, Any]) -> dict[str, Any]:
    """Launches of one block and of the loss head, by objective and part."""
    import math

    import torch
    from fake_gpu.counting import Counter, Values
    from fake_gpu.kernels import TritonKernels, compiled_elementwise, torch_attention
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_slm.config.backends import Backends
    from megatron_slm.loss import blocks, selective_ce
    from megatron_slm.loss.objective import Objective, OutputWeight, StepSettings
    from megatron_slm.model.block import Block
    from megatron_slm.parallel.groups import TensorParallel
    from megatron_slm.parallel.layers import ParallelLayers
    from megatron_slm.selection.scores import SCORES
    from megatron_slm.selection.selector import Selector
    from megatron_slm.types import MicroBatch, TokenStatistics

    length, samples, width = setting["length"], setting["samples"], arch.hidden_size
    found: dict[str, Any] = {"heads": {}, "blocks": {}}
    share = {"clm": 1.0, "slm": setting["keep"]}
    at = {"share": 1.0}
    counter = Counter(Values(rows_of=lambda _, n: math.ceil(at["share"] * n)))
    selective_ce.choose_kernels = lambda *_, **__: TritonKernels(counter)  # type: ignore[assignment, return-value]
    with torch_attention(), compiled_elementwise(counter), FakeTensorMode(), torch.device("cuda"):
        x_sbd = torch.empty(length, samples, width, dtype=torch.bfloat16, requires_grad=True)
        with counter:  # once, for what is kept
            blocks._multiplies_into_fp32(x_sbd.device, torch.bfloat16)
        for name, fuses in (("eager", False), ("compiled", True)):
            torch.set_default_dtype(torch.bfloat16)
            block = Block(arch, ParallelLayers(backends=Backends(fuses_elementwise=fuses)), 0)
            torch.set_default_dtype(torch.float32)
            found["block parameters"] = sum(p.numel() for p in block.parameters())
            found["blocks"][name] = _block_launches(block, x_sbd, counter)
        weight = torch.empty(arch.vocab_size, width, dtype=torch.bfloat16, requires_grad=True)
        tokens = torch.empty(samples, length, dtype=torch.int64)
        batch = MicroBatch(tokens, tokens, torch.empty(samples, length, dtype=torch.bool), tokens[:, 0])
        output = OutputWeight(weight, 0, arch.vocab_size)
        for objective in ("clm", "slm"):
            x_sbd.grad = weight.grad = None  # each micro-batch's own, added up in fp32 elsewhere
            at["share"] = share[objective]
            chosen = {"scores": (SCORES["excess"],), "keep_ratio": share["slm"]} if objective == "slm" else {}
            head = Objective(selector=Selector(**chosen), tp=TensorParallel())  # type: ignore[arg-type]
            losses = TokenStatistics(torch.empty(samples * length)) if objective == "slm" else None
            parts = {}
            with counter:
                if objective == "slm":
                    head.statistics(x_sbd.detach(), output, batch)
                    parts["reference head"] = counter.take().launches
                loss, _ = head.loss(x_sbd, output, batch, losses, StepSettings(step=5))
                parts["head forward"] = counter.take().launches
                loss.backward()
                parts["head backward"] = counter.take().launches
            found["heads"][objective] = parts
    return found


def _block_launches(block: Any, x_sbd: Any, counter: Any) -> dict[str, Any]:
    """Launches of a block's passes."""
    import torch

    with counter:
        block(x_sbd)  # once, for what is kept
        counter.take()
        y_sbd = block(x_sbd)
        launches = {"block forward": counter.take().launches}
        x_sbd.grad = None
        y_sbd.backward(torch.empty_like(y_sbd))
        launches["block backward"] = counter.take().launches
        with torch.no_grad():
            block(x_sbd)
        return {**launches, "reference block": counter.take().launches}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
    import fake_gpu.device  # noqa: F401  (before torch)

    print(json.dumps(model(sys.argv[2], sys.argv[1])))
