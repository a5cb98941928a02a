"""Runs functions in processes whose torch has a fake CUDA device (tools/fake_gpu), forked from one that imported all."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TOOLS = Path(__file__).resolve().parents[2] / "tools"


class FakeGpuError(AssertionError):
    """The function raised; the message is its traceback."""


class FakeGpu:
    """The process that imports torch after the fake device's library, and forks for each call."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.fake_gpu"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TOOLS.parent)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a module-level function returns there.

        Raises:
            FakeGpuError: it raised, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _write(self._process.stdin, (function.__module__, function.__qualname__, args, kwargs))
        is_result, value = _read(self._process.stdout)
        if not is_result:
            raise FakeGpuError(value)
        return value

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _write(stream: BinaryIO | Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _read(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        return False, "the process with the fake device ended"
    return pickle.loads(stream.read(int.from_bytes(head, "little")))


def _answer(module: str, name: str, args: Any, kwargs: Any) -> tuple[bool, Any]:
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return True, function(*args, **kwargs)  # type: ignore[operator]
    except BaseException:
        return False, traceback.format_exc()


def _serve() -> None:
    """Answer calls, each in a fork, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what functions print is no answer
    sys.path.insert(0, str(TOOLS))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import fake_gpu.device  # noqa: F401
    import torch

    torch.set_num_threads(1)
    import tests.gpu.cases  # noqa: F401

    while True:
        request = _read(sys.stdin.buffer)
        if len(request) != 4:
            return
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(theirs, "wb") as pipe:
                _write(pipe, _answer(*request))
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours, "rb") as pipe:
            _write(answers, _read(pipe))
        os.waitpid(child, 0)


if __name__ == "__main__":
    _serve()
