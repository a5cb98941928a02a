"""Steps of 1B- and 7B-shaped models with few layers: speed, memory against the plan, exact against sampled backward."""

from __future__ import annotations

import math
import shutil
from typing import Any

from gpu_checks import training
from gpu_checks.check import Outcome, Setting
from gpu_checks.training import Shape

_STEPS = 10
_TIMED_FROM = 4
"""The steps before compile, choose algorithms and fill caches."""
_SHAPES = {
    "1b": Shape(layers=6, hidden=2048, ffn=5632, heads=32, groups=4, vocabulary=32000, length=2048),
    "7b": Shape(layers=3, hidden=4096, ffn=14336, heads=32, groups=8, vocabulary=32000, length=4096),
}
_SMALL = {
    "1b": Shape(layers=2, hidden=64, ffn=176, heads=8, groups=1, vocabulary=512, length=64),
    "7b": Shape(layers=2, hidden=64, ffn=224, heads=8, groups=2, vocabulary=512, length=128),
}
"""Their proportions, for a CPU."""
_SAMPLES = {"1b": 8, "7b": 1}
"""Of a micro-batch."""
_MEMORY_TOLERANCE = 0.10
"""Share by which the measured peak may exceed the plan's."""


def step_1b(setting: Setting) -> Outcome:
    """Six layers of a 1.1B model at 2,048 tokens."""
    return _steps("1b", setting)


def step_7b(setting: Setting) -> Outcome:
    """Three layers of a 7B model at 4,096 tokens."""
    return _steps("7b", setting)


def _steps(name: str, setting: Setting) -> Outcome:
    shape, samples = _SHAPES[name], _SAMPLES[name]
    if setting.small:
        shape, samples = _SMALL[name], min(samples, 2)
    corpus = training.write_corpus(setting.folder / "corpus", shape, samples=4 * samples * (_STEPS + 2))
    reference = training.write_model(setting.folder / "reference", shape, device=setting.device, seed=1)
    common = {
        **shape.flags(), "data-path": corpus, "lr": 1e-4, "micro-batch-size": samples, "global-batch-size": 4 * samples,
        "train-iters": _STEPS, "bf16": True, "timing-log-level": 1, "no-compile-blocks": True,
        "no-compile-elementwise": True,
    }  # fmt: skip
    sampled = {"backward-rows": "sampled", "backward-row-share": 0.7}
    by_itself = {"compile-elementwise": True, "no-compile-elementwise": None}
    slm = {"objective": "slm", "reference-load": reference}
    contenders: dict[str, dict[str, Any]] = {
        "clm": {"objective": "clm"},
        "slm": slm,
        "slm, rows sampled 0.7": {**slm, **sampled},
        "slm, rows kept": {**slm, "backward-rows": "kept"},
    }
    if setting.num_gpus:
        contenders["clm, compiled element-wise"] = {"objective": "clm", **by_itself}
        contenders["slm, rows sampled 0.7, compiled element-wise"] = {**slm, **sampled, **by_itself}
        contenders["clm, compiled blocks"] = {"objective": "clm", "compile-blocks": True, "no-compile-blocks": None}
        contenders["slm, compiled blocks"] = {**slm, "compile-blocks": True, "no-compile-blocks": None}
    records: list[dict[str, Any]] = []
    for contender, changes in contenders.items():
        flags = {**common, **changes, "run-dir": setting.folder / contender.replace(" ", "-").replace(",", "")}
        try:
            lines = training.train(flags)
        except RuntimeError as error:
            records.append({"run": contender, "failed": str(error)})
            continue
        records.append(_record(contender, lines, _planned_mib(flags)))
        shutil.rmtree(flags["run-dir"])
    plain = next((r["ms a step"] for r in records if r["run"] == "clm" and "ms a step" in r), None)
    for record in records:
        if plain and "ms a step" in record:
            record["step / clm"] = record["ms a step"] / plain
    return _judged(records, setting)


def _record(contender: str, lines: list[dict[str, Any]], planned_mib: float) -> dict[str, Any]:
    timed = lines[_TIMED_FROM:]
    peak = timed[-1]["memory_peak_mib"]
    return {
        "run": contender,
        "ms a step": 1e3 * training.median([line["step_time_seconds"] for line in timed]),
        "tokens/s": training.median([line["tokens_per_second"] for line in timed]),
        "MFU": timed[-1]["mfu"],
        "MFU with reference": timed[-1].get("mfu_with_reference"),
        "peak MiB": peak,
        "planned MiB": planned_mib,
        "peak / planned": peak / planned_mib,
        "first and last loss": [lines[0]["loss"], lines[-1]["loss"]],
    }


def _planned_mib(flags: dict[str, Any]) -> float:
    """The planner's peak for the run on one GPU."""
    from megatron_slm.flags.load import parse
    from megatron_slm.planning.layouts import configured_layout
    from megatron_slm.planning.memory import OneForwardOneBackward, stage_memory
    from megatron_slm.planning.planned_run import plan_run

    run = plan_run(parse(training.words(flags))[0])
    layout = configured_layout(run, 1)
    return stage_memory(run, layout, OneForwardOneBackward(1, layout.num_micro_batches))[0].total / 2**20


def _judged(records: list[dict[str, Any]], setting: Setting) -> Outcome:
    failed = [r["run"] for r in records if "failed" in r]
    wrong = [r["run"] for r in records if "failed" not in r and not all(map(math.isfinite, r["first and last loss"]))]
    # a CPU's figure is the whole process's
    over = [r["run"] for r in records if setting.num_gpus and r.get("peak / planned", 0) > 1 + _MEMORY_TOLERANCE]
    ran = [r for r in records if "failed" not in r]
    parts = [f"{r['run']}: {r['tokens/s']:,.0f} tokens/s" + (f", MFU {r['MFU']:.1%}" if r["MFU"] else "") for r in ran]
    named = {"failed": failed, "loss not finite": wrong, "more memory than planned": over}
    problems = [f"{what}: {', '.join(names)}" for what, names in named.items() if names]
    return Outcome(held=not problems, summary="; ".join([*problems, *parts]), figures={"runs": records})
