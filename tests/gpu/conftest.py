"""The fake CUDA device, once for all tests that use it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support.fake_gpu import TOOLS, FakeGpu

sys.path.insert(0, str(TOOLS))

from fake_gpu.build import NoCompilerError, library


@pytest.fixture(scope="session")
def fake_gpu() -> Iterator[FakeGpu]:
    """Runs functions in a process whose torch has the fake device; skipped only where nothing compiles it."""
    try:
        library()
    except NoCompilerError as error:
        pytest.skip(str(error))
    process = FakeGpu()
    yield process
    process.close()
