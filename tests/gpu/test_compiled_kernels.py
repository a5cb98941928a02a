"""The loss head's Triton kernels compiled for Ampere, Hopper and Blackwell: registers, no spills, wide accesses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_slm.loss.blocks import BLOCK_SIZE, GPU_BLOCK_SIZE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it has no builds for this platform)"
)
REGISTERS_OF_A_PROCESSOR = 65536


def compiled(capabilities: str, tiles: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu.compile_kernels", capabilities, tiles]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict[str, Any]]) -> None:
    assert kernels
    for kernel in kernels:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 64, kernel
        threads = 32 * kernel["warps"]
        assert REGISTERS_OF_A_PROCESSOR // (threads * kernel["registers"]) >= 2, f"two programs a processor: {kernel}"
        assert kernel["shared"] <= 1024, kernel
        assert not kernel["fp64"], "fp64 arithmetic is slow on most GPUs"
        if kernel["aligned"]:
            assert kernel["wide"] > 0, f"128 bits at once: {kernel}"


@pytest.mark.parametrize("capability", ["90"])
def test_the_block_of_a_gpu(capability: str) -> None:
    check(compiled(capability, str(GPU_BLOCK_SIZE)))


@pytest.mark.slow
def test_all_of_them() -> None:
    kernels = compiled("80,90,100", f"{GPU_BLOCK_SIZE},{BLOCK_SIZE},1024,16")
    check([kernel for kernel in kernels if int(kernel["TILE"]) >= 1024])
    assert {kernel["capability"] for kernel in kernels} == {80, 90, 100}
