"""Commands run in this process: what a tool prints, without the seconds of starting one."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys


def run_here(module: str, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `megatron_slm.cli.MODULE` with these words; its exit code and output."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = importlib.import_module(f"megatron_slm.cli.{module}").main([str(word) for word in words])
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        sys.stdin = before
    return subprocess.CompletedProcess([module, *map(str, words)], code, out.getvalue(), err.getvalue())
