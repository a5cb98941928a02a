"""Compiles the loss head's Triton kernels for GPUs that are not here; prints one JSON object a kernel.

Run as a process of its own, because the tests' own has Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_slm.loss import triton_backend

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = ("num_columns", "logits_stride", "exponentials_stride", "x_stride", "out_stride")


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], *, capability: int, aligned: bool
) -> dict[str, Any]:
    """What a kernel needs of a GPU.

    Args:
        types: of the arguments that are not fp32 pointers.
        aligned: columns and strides are multiples of 16, as in all blocks but the last of some vocabularies.
    """
    signature = {name: "i32" if name in INTEGERS else "*fp32" for name in kernel.arg_names}
    signature |= {"label_column": "*i64", **types, **dict.fromkeys(constants, "constexpr")}
    divisible = [name for name in kernel.arg_names if name not in constants and (aligned or name not in INTEGERS)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = triton_backend.num_warps(constants["TILE"])
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(found.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("cuobjdump", "-sass", str(cubin))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "aligned": aligned,
        **{name: str(value) for name, value in {**types, **constants}.items()},
        "warps": warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": found.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "fp64": "f64" in found.asm["ptx"],
        "wide": len(re.findall(r"(?:LDG|STG)\.E\.128", code)),
    }


def _run(tool: str, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}  # cuobjdump calls nvdisasm
    return subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Both kernels as the loss calls them: with and without a stash, in bf16 and fp32, with entropies."""
    fold, gradient = triton_backend._fold, triton_backend._gradient
    found: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for keep, entropy, stash in ((False, False, "*fp32"), (True, False, "*bf16"), (True, True, "*bf16")):
        found.append((fold, {"exponentials": stash}, {"KEEP": keep, "ENTROPY": entropy}))
    for logits, x, out in ((True, "*fp32", "*bf16"), (False, "*bf16", "*bf16"), (True, "*fp32", "*fp32")):
        found.append((gradient, {"x": x, "out": out}, {"LOGITS": logits}))
    return found


def main(capabilities: list[int], tiles: list[int]) -> None:
    for capability in capabilities:
        for tile in tiles:
            for kernel, types, constants in variants():
                for aligned in (True, False) if tile == tiles[0] else (True,):
                    values = {**constants, "TILE": tile}
                    print(
                        json.dumps(compiled(kernel, types, values, capability=capability, aligned=aligned)), flush=True
                    )


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1].split(",")], [int(x) for x in sys.argv[2].split(",")])
