"""The machine, and the backends that a run would choose on it."""

from __future__ import annotations

import platform
import subprocess

from gpu_checks.check import Outcome, Setting


def environment(setting: Setting) -> Outcome:
    """Name versions, GPUs, and each optional package with the reason it is not used; torch must see what is there."""
    import torch

    import megatron_slm
    from megatron_slm.backends import packages
    from megatron_slm.device import cuda_versions

    found = [
        packages.find(package) for package in (packages.FLASH, packages.FLASH3, packages.APEX_NORM, packages.APEX_ADAM)
    ]
    figures = {
        "megatron_slm": megatron_slm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(cuda_versions()) if setting.num_gpus else None,
        "driver": _driver(),
        "gpus": [_gpu(index) for index in range(setting.num_gpus)],
        "packages": [
            {"package": finding.name, "for": use, "works": finding.works, "why not": finding.problem}
            for use, finding in zip(("attention", "attention", "norms", "optimizer"), found, strict=True)
        ],
    }
    broken = [f for f in found if f.problem not in (None, "not installed")]
    names = ", ".join(sorted({str(gpu["name"]) for gpu in figures["gpus"]})) if setting.num_gpus else "no GPU"
    usable = ", ".join(f.name for f in found if f.works) or "none"
    summary = f"{names}, torch {torch.__version__}; optional packages that work: {usable}"
    if broken:
        summary += "; installed but broken: " + ", ".join(f"{f.name} ({f.problem})" for f in broken)
    return Outcome(held=not broken, summary=summary, figures=figures)


def _gpu(index: int) -> dict[str, object]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GiB": total / 2**30,
        "free GiB": free / 2**30,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None
