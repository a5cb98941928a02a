"""Finds the optional GPU packages that work in this process, and why the others do not.

A package's name proves little: `flash_attn` is also the folder of flash-attn 4 alone, PyPI's `apex` is another project,
and NVIDIA's apex imports without its CUDA extensions. So each one is imported down to the functions that are called,
and runs them once, forward and backward, against torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from megatron_slm.device import local_device
from megatron_slm.model import flash, flash3, sdpa
from megatron_slm.model.norm import normalize, normalize_in_apex

_TOLERANCE = 2.0**-5
"""Largest difference from torch of values near 1 in bf16; a kernel that computes something else is far beyond."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A package as it was found in this process."""

    name: str
    """Package and version, such as `flash-attn 2.8.3`."""
    problem: str | None = None
    """The reason it cannot be used; None where it can."""

    @property
    def works(self) -> bool:
        """True where it can be used in this process."""
        return self.problem is None


@dataclass(frozen=True, kw_only=True)
class Package:
    """An optional package.

    Args:
        name: of the distribution, as its makers call it.
        functions: (module, attribute) pairs that are used; an empty attribute only imports the module.
        least: oldest version with the interface that is called; None accepts any.
        trial: computes with it on this process's device; raises where the result is wrong.
        fix: how to install it.
    """

    name: str
    functions: tuple[tuple[str, str], ...]
    trial: Callable[[], None]
    fix: str
    least: tuple[int, ...] | None = None


@cache
def find(package: Package) -> Finding:
    """Import a package and try it, once a process."""
    top = package.functions[0][0].partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return Finding(name=package.name, problem="not installed")
    version = _version(package.name)
    name = f"{package.name} {version}" if version else package.name
    for module, attribute in package.functions:
        try:
            found = importlib.import_module(module)
        except Exception as error:  # extension modules fail with whatever their makers raise
            return Finding(name=name, problem=f"importing {module} fails: {_first_line(error)}")
        if attribute and not hasattr(found, attribute):
            return Finding(name=name, problem=f"{module} has no {attribute}")
    if package.least is not None and version is not None and _numbers(version) < package.least:
        return Finding(name=name, problem=f"older than {'.'.join(map(str, package.least))}")
    try:
        package.trial()
    except Exception as error:
        return Finding(name=name, problem=f"a trial fails: {_first_line(error)}")
    return Finding(name=name)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---- trials: what is called, called once -----------------------------------------------------------------------

Attend = Callable[..., Tensor]
"""Takes q, k, v and a window."""


def try_attention(attend: Attend, *, width: int = 64, window: int | None = None, dtype: torch.dtype) -> None:
    """Run an attention with grouped heads, forward and backward, and compare it with every pair and a mask.

    Raises:
        RuntimeError: the results differ; or whatever the kernel raises.
    """
    device, length = local_device(), 128
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(length, 1, heads, width, generator=draw) for heads in (4, 2, 2)]
    gradient = torch.randn(length, 1, 4, width, generator=draw)
    ours = _outcome(attend, [x.to(device, dtype) for x in inputs], gradient.to(device, dtype), window)
    theirs = _outcome(sdpa.attend_by_definition, [x.to(dtype).float() for x in inputs], gradient, window)
    _compare(ours, theirs)


def _outcome(attend: Attend, inputs: list[Tensor], gradient: Tensor, window: int | None) -> list[Tensor]:
    for x in inputs:
        x.requires_grad_(True)
    out = attend(*inputs, window)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


def _compare(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        error = (one.cpu().float() - other.cpu().float()).abs().max().item()
        if not error <= _TOLERANCE * max(1.0, other.abs().max().item()):
            raise RuntimeError(f"its results differ from torch's by {error:.3g}")


def _try_flash() -> None:
    for window in (None, 32):
        try_attention(flash.attend, window=window, dtype=torch.bfloat16)


def _try_flash3() -> None:
    for window in (None, 32):
        try_attention(flash3.attend, window=window, dtype=torch.bfloat16)


def _try_norm() -> None:
    _compare_norm(normalize_in_apex)


def _try_compiler() -> None:
    """Compile a norm as blocks are compiled: with Triton, which needs a C compiler."""
    _compare_norm(torch.compile(normalize, dynamic=False))


def _compare_norm(norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    draw, device = torch.Generator().manual_seed(0), local_device()
    x, weight, gradient = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((16, 256), (256,), (16, 256)))
    outcomes = []
    for one in (norm, normalize):
        held = [t.detach().to(device).requires_grad_(True) for t in (x, weight)]
        out = one(held[0], held[1], 1e-5)
        out.backward(gradient.to(device))
        outcomes.append([out.detach(), *(t.grad for t in held if t.grad is not None)])
    _compare(*outcomes)


def _try_adam() -> None:
    from apex.optimizers import FusedAdam

    device, outcomes = local_device(), []
    for make in (partial(FusedAdam, adam_w_mode=True), torch.optim.AdamW):
        parameter = torch.linspace(-1, 1, 64, device=device).requires_grad_(True)
        optimizer = make([parameter], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            parameter.grad = torch.linspace(1, -2, 64, device=device)
            optimizer.step()
        outcomes.append([parameter.detach()])
    _compare(*outcomes)


_APEX = (
    "build NVIDIA's apex from github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (docs/gpus.md; the package "
    "`apex` of PyPI is another project)"
)

FLASH = Package(
    name="flash-attn",
    functions=(("flash_attn", "flash_attn_func"), ("flash_attn", "flash_attn_varlen_func"), ("flash_attn_2_cuda", "")),
    trial=_try_flash,
    least=(2, 3),  # windows
    fix="build it for this torch: pip install flash-attn --no-build-isolation (docs/gpus.md)",
)
FLASH3 = Package(
    name="flash-attn-3",
    functions=(("flash_attn_interface", "flash_attn_func"), ("flash_attn_interface", "flash_attn_varlen_func")),
    trial=_try_flash3,
    fix="build it on a Hopper GPU from the folder `hopper` of github.com/Dao-AILab/flash-attention (docs/gpus.md)",
)
APEX_NORM = Package(
    name="apex",
    functions=(("apex.normalization.fused_layer_norm", "fused_rms_norm_affine"), ("fused_layer_norm_cuda", "")),
    trial=_try_norm,
    fix=_APEX,
)
COMPILER = Package(
    name="triton",
    functions=(("triton", ""),),
    trial=_try_compiler,
    fix="install triton and a C compiler (docs/gpus.md)",
)
APEX_ADAM = Package(
    name="apex",
    functions=(("apex.optimizers", "FusedAdam"), ("amp_C", "")),
    trial=_try_adam,
    fix=_APEX,
)
