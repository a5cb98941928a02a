"""Packages that look like flash-attn and apex, as folders on `sys.path`, and a process that believes it has a GPU."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.run import backends, packages

CORRECT = {
    "flash_attn/__init__.py": """
        __version__ = "2.8.3"
        from tests.support.plain_kernels import flash_attn_func, flash_attn_varlen_func
        """,
    "flash_attn_2_cuda.py": "",
    "flash_attn_interface.py": "from tests.support.plain_kernels import flash3_func as flash_attn_func, flash_attn_varlen_func",
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "from tests.support.plain_kernels import fused_rms_norm_affine",
    "fused_layer_norm_cuda.py": "",
    "apex/optimizers/__init__.py": "from tests.support.plain_kernels import FusedAdam",
    "amp_C.py": "",
}
"""Everything installed and right, computed with torch's plain operations."""


def files_of(*names: str) -> dict[str, str]:
    """The files of `CORRECT` that make up flash, flash3 or apex."""
    prefixes = {
        "flash": ("flash_attn/", "flash_attn_2_cuda"),
        "flash3": ("flash_attn_interface",),
        "apex": ("apex/", "fused_layer_norm_cuda", "amp_C"),
    }
    wanted = tuple(prefix for name in names for prefix in prefixes[name])
    return {path: text for path, text in CORRECT.items() if path.startswith(wanted)}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """Make the files importable, in a process that has imported nothing of the kind yet."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)
    tops = ("flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "apex", "fused_layer_norm_cuda", "amp_C")
    for module in [name for name in sys.modules if name.partition(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, module)
    packages.find.cache_clear()


def believe_in_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0), *, compiles: bool = False
) -> None:
    """The choice of backends sees a GPU; what it tries is computed on the CPU, and what it compiles is not at all."""

    def try_compiler() -> None:
        if not compiles:
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(packages, "COMPILER", dataclasses.replace(packages.COMPILER, trial=try_compiler))
    monkeypatch.setattr(backends, "on_gpu", lambda: True)
    monkeypatch.setattr(backends, "compute_capability", lambda: capability)


def forget(_: Any = None) -> None:
    """Drop what was found and imported, for the next test."""
    packages.find.cache_clear()
    for name in list(sys.modules):
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "apex", "amp_C"):
            del sys.modules[name]
