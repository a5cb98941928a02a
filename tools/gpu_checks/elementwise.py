"""Compiled norms, rotations and gated activations on this device against their definitions in fp64, and their speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_checks.check import Outcome, Setting
from gpu_checks.kernels import LARGEST_ERROR, measure


def elementwise(setting: Setting) -> Outcome:
    """Every piece forward and backward; on a CPU through the compiler's tracing alone, without its code generator."""
    import torch

    from megatron_slm.model import fused

    if not setting.num_gpus:
        fused.COMPILER = "aot_eager"
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (plain, ours, inputs, others) in _pieces(setting).items():
            truth = _passes(plain, inputs, others, torch.float64, setting.device)()
            steps = [_passes(function, inputs, others, dtype, setting.device) for function in (ours, plain)]
            pairs = zip(steps[0](), truth, strict=True)
            ms = [1e3 * measure(step, setting)[0] for step in steps]
            records.append({
                "piece": name, "dtype": str(dtype).removeprefix("torch."),
                "error": max(float((one.double() - other).norm() / other.norm()) for one, other in pairs),
                "ms": ms[0], "eager ms": ms[1],
            })  # fmt: skip
    worst = max(record["error"] / LARGEST_ERROR[record["dtype"]] for record in records)
    summary = f"{len(records)} cases at {worst:.2g} of the error allowed"
    if setting.num_gpus:
        gains = [f"{r['piece']} {r['eager ms'] / r['ms']:.1f} x" for r in records if r["dtype"] == "bfloat16"]
        summary += f"; speed over eager: {', '.join(gains)}"
    return Outcome(held=worst <= 1.0, summary=summary, figures={"cases": records})


def _pieces(setting: Setting) -> dict[str, tuple[Any, ...]]:
    """By name: the definition, the compiled one, what has a gradient, and the rest."""
    import torch
    import torch.nn.functional as F

    from megatron_slm.model import fused, norm, rope

    length, width, inner, heads = (16, 64, 96, 4) if setting.small else (4096, 4096, 14336, 32)
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw).bfloat16()

    def swiglu(gate: Any, up: Any) -> Any:
        return F.silu(gate) * up

    angle = torch.rand(length, 1, 1, width // heads // 2, generator=draw) * 6
    return {
        "norm": (norm.normalize, fused.normalize, (drawn(length, 1, width), drawn(width)), (1e-5,)),
        "activation": (swiglu, fused.gate, drawn(length, 1, 2 * inner).split(inner, dim=-1), ()),
        "rotation": (rope.rotate, fused.rotate, (drawn(length, 1, heads, width // heads),), (angle.cos(), angle.sin())),
    }


def _passes(function: Any, inputs: Any, others: Any, dtype: Any, device: str) -> Callable[[], list[Any]]:
    """What runs forward and backward on tensors that are on the device, and returns results and gradients."""
    import torch

    wide = torch.promote_types(dtype, torch.float32)
    held = [x.to(device, dtype).requires_grad_() for x in inputs]
    rest = [x.to(device, wide) if isinstance(x, torch.Tensor) else x for x in others]
    grad = torch.linspace(-1, 2, inputs[0].numel(), device=device).bfloat16().view(inputs[0].shape).to(dtype)

    def run() -> list[Any]:
        out = function(*held, *rest)
        return [out.detach(), *torch.autograd.grad(out, held, grad)]

    return run
