"""The loss head's and attention's kernels on this device against definitions in fp64, and the loss head's speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from gpu_checks.check import Outcome, Setting

LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 2.0**-6}
"""Relative error of a gradient or a result, by dtype: the norm of the difference over the norm."""
_LEAST_ALIKE = {"float32": 0.999, "bfloat16": 0.97}
"""Share of the kept rows that are those of fp64; logits that are rounded to bf16 move rows across the threshold."""


def loss_kernels(setting: Setting) -> Outcome:
    """Losses, kept rows and gradients of every backend and variant against full logits in fp64."""
    import torch

    from megatron_slm.loss import LossHead

    backends = ["torch", "triton"] if setting.num_gpus else ["torch"]
    sizes = (
        [(64, 32, 1000), (33, 16, 2051)]
        if setting.small
        else [(2048, 1024, 32000), (1000, 512, 50257), (512, 256, 128256)]
    )
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            problem = _Problem(size, dtype, setting.device)
            truth = problem.by_definition()
            for backend in backends:
                for variant in ("recompute", "stash", "predictive"):
                    found = problem.through(LossHead(backend=backend, variant=variant), kept_K=truth[1])  # type: ignore[arg-type]
                    records.append({
                        "backend": backend, "variant": variant, "dtype": str(dtype).removeprefix("torch."),
                        "rows, width, vocabulary": str(size), **_compared(found, truth),
                    })  # fmt: skip
    worst = max(record["gradient error"] / LARGEST_ERROR[record["dtype"]] for record in records)
    agreement = min(record["kept alike"] for record in records)
    held = worst <= 1.0 and all(record["kept alike"] >= _LEAST_ALIKE[record["dtype"]] for record in records)
    summary = (
        f"{len(records)} cases; gradients at {worst:.2g} of the error allowed, {agreement:.2%} of the kept rows alike"
    )
    return Outcome(held=held, summary=summary, figures={"allowed error": LARGEST_ERROR, "cases": records})


class _Problem:
    """One micro-batch whose losses are spread as in training, on a device."""

    def __init__(self, size: tuple[int, int, int], dtype: Any, device: str, *, keep: float = 0.6) -> None:
        import torch

        num_rows, width, vocab = size
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(vocab, width, generator=g) * (1.5 / math.sqrt(width))
        label = torch.randint(vocab, (num_rows,), generator=g)
        hidden = torch.randn(num_rows, width, generator=g)
        hidden += (
            torch.rand(num_rows, 1, generator=g) * 10 * weight[label] / weight[label].square().sum(1, keepdim=True)
        )
        self.keep, self.label_N = keep, label.to(device)
        self.reference_N = (torch.rand(num_rows, generator=g) * 6 + 2).to(device)
        self.hidden_Nd = hidden.to(device, dtype).requires_grad_()
        self.weight_Vd = weight.to(device, dtype).requires_grad_()

    def by_definition(self) -> tuple[Any, ...]:
        """Loss sum, kept rows and the two gradients, from a table of logits in fp64."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden_Nd, self.weight_Vd))
        return self._full_logits(hidden, weight)

    def full_logits(self) -> tuple[Any, ...]:
        """The same in the tensors' own precision, the logits in fp32: what training code without this loss does."""
        return self._full_logits(self.hidden_Nd, self.weight_Vd)

    def _full_logits(self, hidden: Any, weight: Any) -> tuple[Any, ...]:
        import torch
        import torch.nn.functional as F

        logits = hidden @ weight.t()
        loss_N = F.cross_entropy(
            logits if logits.dtype == torch.float64 else logits.float(), self.label_N, reduction="none"
        )
        kept_K = self.select(loss_N.detach())
        mask_N = torch.zeros_like(loss_N).index_fill_(0, kept_K, 1.0)
        total = (loss_N * mask_N).sum()
        return total.detach(), kept_K, *torch.autograd.grad(total, [hidden, weight])

    def through(self, head: Any, *, kept_K: Any = None) -> tuple[Any, ...]:
        """The same through the selective loss.

        Args:
            kept_K: rows whose gradients are made, in place of those chosen (which are returned).
        """
        import torch

        from megatron_slm.loss import selective_cross_entropy
        from megatron_slm.types import Selection

        chosen = []

        def select(statistics: Any) -> Selection:
            chosen.append(self.select(statistics.loss_N))
            return Selection(chosen[-1] if kept_K is None else kept_K)

        valid_N = torch.ones_like(self.label_N, dtype=torch.bool)
        loss = selective_cross_entropy(
            self.hidden_Nd, self.weight_Vd, self.label_N, valid_N, select=select, head=head, keep_ratio=self.keep
        )
        grads = torch.autograd.grad(loss.loss_sum, [self.hidden_Nd, self.weight_Vd])
        return loss.loss_sum.detach(), chosen[-1], *grads

    def select(self, loss_N: Any) -> Any:
        """The top share by excess loss, ascending."""
        count = math.ceil(round(self.keep * len(loss_N), 9))
        return (loss_N - self.reference_N).topk(count).indices.sort().values


def _compared(found: tuple[Any, ...], truth: tuple[Any, ...]) -> dict[str, float]:
    alike = len(set(found[1].tolist()) & set(truth[1].tolist())) / len(truth[1])
    errors = [
        float((one.double() - other).norm() / other.norm()) for one, other in zip(found[2:], truth[2:], strict=True)
    ]
    return {
        "loss error": float((found[0].double() - truth[0]).abs() / truth[0].abs()),
        "gradient error": max(errors),
        "kept alike": alike,
    }


def attention(setting: Setting) -> Outcome:
    """Every attention that works here, forward and backward, with groups, windows and documents, against every pair."""
    import torch

    from megatron_slm.backends import packages
    from megatron_slm.model import flash, flash3, sdpa
    from megatron_slm.types import Documents

    kernels: dict[str, Any] = {"sdpa": sdpa}
    missing = {}
    for name, module, package in (("flash", flash, packages.FLASH), ("flash3", flash3, packages.FLASH3)):
        finding = packages.find(package)
        if finding.works:
            kernels[name] = module
        else:
            missing[name] = finding.problem
    length, widths = (64, (16,)) if setting.small else (1024, (64, 128))
    lengths = (length // 2, length // 8, length - length // 2 - length // 8) * 2
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=setting.device)
    records = []
    for width in widths:
        for heads, groups in ((8, 2), (4, 4)):
            for window in (None, length // 4):
                for keeps_apart in (False, True):
                    documents = Documents(lengths, ends, None) if keeps_apart else None
                    draw = torch.Generator().manual_seed(0)
                    shapes = [(length, 2, n, width) for n in (heads, groups, groups)]
                    inputs = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
                    dout = torch.randn(length, 2, heads, width, generator=draw).bfloat16()
                    truth = _attended(sdpa, inputs, dout, window, documents, setting.device, exact=True)
                    for name, module in kernels.items():
                        found = _attended(module, inputs, dout, window, documents, setting.device)
                        pairs = zip(found, truth, strict=True)
                        error = max(float((one.double() - other).norm() / other.norm()) for one, other in pairs)
                        records.append({
                            "attention": name, "width": width, "heads/groups": f"{heads}/{groups}", "window": window,
                            "documents": keeps_apart, "error": error,
                        })  # fmt: skip
    allowed = LARGEST_ERROR["bfloat16"]
    worst = max(record["error"] for record in records)
    summary = f"{', '.join(kernels)}: {len(records)} cases, largest error {worst:.2g} of {allowed:.2g} allowed"
    summary += "".join(f"; {name}: {problem}" for name, problem in missing.items())
    return Outcome(held=worst <= allowed, summary=summary, figures={"cases": records, "not here": missing})


def _attended(
    module: Any, inputs: list[Any], dout: Any, window: int | None, documents: Any, device: str, *, exact: bool = False
) -> list[Any]:
    """Result and gradients, in bf16 or by definition in fp64."""
    import torch

    q, k, v = held = [x.to(device).double() if exact else x.to(device) for x in inputs]
    for x in held:
        x.requires_grad_()
    if documents is None:
        attend = module.attend_by_definition if exact else module.attend
        out = attend(q, k, v, window)
    else:
        parts = [x.transpose(0, 1).flatten(0, 1) for x in held]
        if exact:
            split = zip(*(x[:, None].split(documents.lengths) for x in parts), strict=True)
            flat = torch.cat([module.attend_by_definition(*part, window) for part in split]).squeeze(1)
        else:
            flat = module.attend_in_documents(*parts, window, documents)
        out = flat.unflatten(0, (inputs[0].shape[1], inputs[0].shape[0])).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, held, dout.to(device, out.dtype))]


def loss_head_speed(setting: Setting) -> Outcome:
    """Time and memory of forward and backward, over those of full logits, at three vocabularies."""
    import torch

    from megatron_slm.loss import LossHead

    sizes = [(64, 32, 1000)] if setting.small else [(8192, 2048, 32000), (4096, 4096, 50304), (4096, 4096, 128256)]
    dtype = torch.float32 if setting.small else torch.bfloat16
    records = []
    for size in sizes:
        problem = _Problem(size, dtype, setting.device)
        seconds, peak = measure(problem.full_logits, setting)
        num_rows, width, vocab = size
        for variant in ("recompute", "stash"):
            head = LossHead(variant=variant)  # type: ignore[arg-type]
            ours, memory = measure(lambda problem=problem, head=head: problem.through(head), setting)
            products = 1 + (3 if variant == "recompute" else 2) * problem.keep
            records.append(
                {
                    "rows": num_rows,
                    "width": width,
                    "vocabulary": vocab,
                    "variant": variant,
                    "ms": 1e3 * ours,
                    "full logits ms": 1e3 * seconds,
                    "time ratio": ours / seconds,
                    "memory ratio": memory / peak if peak else None,
                    "TFLOP/s of its products": 2 * products * num_rows * width * vocab / ours / 1e12,
                }
            )
    best = [min(r["time ratio"] for r in records if r["vocabulary"] == size[2]) for size in sizes]
    ratios = ", ".join(f"{ratio:.2f} at {size[2]}" for ratio, size in zip(best, sizes, strict=True))
    summary = f"time over full logits', keep 0.6, by vocabulary: {ratios}"
    return Outcome(held=True, summary=summary, figures={"loss head": records})


def measure(step: Callable[[], object], setting: Setting, *, rounds: int = 7) -> tuple[float, int]:
    """Median seconds, and the peak of memory beyond what is held before (0 on a CPU)."""
    import torch

    def synchronize() -> None:
        if setting.num_gpus:
            torch.cuda.synchronize()

    peak, seconds = 0, []
    step()  # compiles, and fills torch's cache of memory
    for _ in range(rounds):
        synchronize()
        if setting.num_gpus:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
        if setting.num_gpus:
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
    return sorted(seconds)[rounds // 2], peak
