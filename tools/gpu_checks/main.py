"""Runs the checks one after another and writes what they found after each."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from gpu_checks import page
from gpu_checks.check import Check, Result, Setting, SkipCheck
from gpu_checks.every import CHECKS

_OUTPUT_LINES = 25
"""Of a failed check, on the page."""


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="gpu_check", help="folder for the results (default: ./gpu_check)")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], help="checks to run")
    parser.add_argument("--small", action="store_true", help="tiny shapes; always so on a machine without a GPU")
    parser.add_argument("--in-process", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = Path(arguments.output).resolve()
    if arguments.in_process:
        return _run_here(arguments.in_process, folder, small=arguments.small)
    folder.mkdir(parents=True, exist_ok=True)
    num_gpus = _count_gpus()
    small = arguments.small or num_gpus == 0
    if num_gpus == 0:
        print("no GPU is visible: the checks run on the CPU, in small; they say nothing about a GPU")
    checks = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
    results: list[Result] = []
    for check in checks:
        print(f"{check.name}: {check.what} ...", flush=True)
        result = _run_apart(check, folder, num_gpus=num_gpus, small=small)
        print(f"{check.name}: {result.status} after {result.seconds:.0f} s: {result.summary}", flush=True)
        results.append(result)
        page.write(folder, results, num_gpus=num_gpus, small=small)  # what a later crash cannot take away
    print(page.table(results))
    print(f"written: {folder / 'gpu_check.json'} and {folder / 'gpu_check.md'}")
    return int(any(result.status == "failed" for result in results))


def _count_gpus() -> int:
    """In a process of its own: a process that has initialised CUDA holds memory on the GPU."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def _run_apart(check: Check, folder: Path, *, num_gpus: int, small: bool) -> Result:
    started = time.monotonic()

    def ended(status: str, summary: str, **more: object) -> Result:
        seconds = time.monotonic() - started
        return Result(name=check.name, what=check.what, status=status, summary=summary, seconds=seconds, **more)  # type: ignore[arg-type]

    if num_gpus and check.processes > num_gpus:
        return ended("skipped", f"needs {check.processes} GPUs, there is {num_gpus}")
    log = folder / f"{check.name}.txt"
    answer = folder / f"{check.name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, sys.argv[0], "--in-process", check.name, "--output", str(folder)]
    environment = os.environ | ({} if num_gpus else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    with log.open("w") as file:
        process = subprocess.Popen(
            command + ["--small"] * small,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(check.limit_seconds)
        except subprocess.TimeoutExpired:
            reason = f"did not end within {check.limit_seconds} s"
        else:
            reason = f"ended with exit code {process.returncode} and without a result"
        finally:
            _kill(process)
    if answer.exists():
        found = json.loads(answer.read_text())
        answer.unlink()
        if found["status"] == "failed":
            found["output"] = _tail(log)
        return ended(**found)
    return ended("failed", reason, output=_tail(log))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the check's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_OUTPUT_LINES:])


def _run_here(name: str, folder: Path, *, small: bool) -> int:
    """Run one check in this process, and write its result where the parent looks for it."""
    import torch

    check = next(check for check in CHECKS if check.name == name)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            outcome = check.run(Setting(folder=Path(scratch), small=small, num_gpus=num_gpus))
            found = {
                "status": "held" if outcome.held else "failed",
                "summary": outcome.summary,
                "figures": outcome.figures,
            }
        except SkipCheck as reason:
            found = {"status": "skipped", "summary": str(reason)}
        except Exception as error:
            traceback.print_exc()
            found = {
                "status": "failed",
                "summary": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            }
    part = folder / f"{name}.json.part"
    part.write_text(json.dumps(found))
    part.rename(folder / f"{name}.json")
    return 0
