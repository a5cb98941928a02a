"""Runs one command: logging, named errors, exit codes and teardown, the same for every tool.

A command module is imported before its flags are parsed, so it imports what only its work needs (torch, DeepSpeed,
transformers) inside functions: `--help` and a refused flag then cost a second and not ten.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_slm.errors import ConfigError, SlmError
from megatron_slm.files import raise_open_file_limit
from megatron_slm.log import claim_report, print_traceback, report_in, setup_logging
from megatron_slm.parallel.launched import launched_rank

INTERRUPTED = 128 + signal.SIGINT


def run_command(
    run: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    exit_code: Callable[[SlmError], int] = lambda error: 1,
) -> int:
    """Run a command with its words; return its exit code.

    Args:
        run: takes the command line without the program's name; returns an exit code, or None for success.
        argv: the command line; by default this process's.
        exit_code: of an error the user can fix, which is printed as one line on standard error, by one rank.
    """
    raise_open_file_limit()
    report_in(None)
    setup_logging(launched_rank())
    completed = False
    try:
        code = run(sys.argv[1:] if argv is None else argv) or 0
        completed = True
        return code
    except SlmError as error:
        _report(error)
        return exit_code(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:
        print_traceback(error)
        return 1
    finally:
        _leave_process_group(completed=completed)


def _report(error: SlmError) -> None:
    """Print an error as one line, unless another rank prints the same.

    Before there is a process group every rank of a node reads the same flags and files, and its first one prints.
    """
    line = " ".join(str(error).split("\n"))
    in_group = _process_group() is not None
    if not in_group and isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if error.raised_by is not None or (in_group and not claim_report(line)):
        return
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        line += f" (rank {os.environ['RANK']}, host {socket.gethostname()})"
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()


def _process_group() -> Any | None:
    """Return torch.distributed if this process is in a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def _leave_process_group(*, completed: bool) -> None:
    """Destroy the process groups; after an error on NCCL abort them, since destroying waits for every kernel."""
    if (dist := _process_group()) is None:
        return
    if completed or dist.get_backend() != "nccl":
        dist.destroy_process_group()
        return
    with contextlib.suppress(Exception):  # the error is reported; the process is about to end
        dist.distributed_c10d._abort_process_group()


def choose_accelerator() -> None:
    """Have DeepSpeed use the CPU where torch finds no accelerator; call it before anything imports DeepSpeed.

    DeepSpeed would make the same choice, with a warning that it guessed.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def execute(module: str, *, is_rank: bool = False) -> NoReturn:
    """Run the command in `megatron_slm.cli.MODULE` as this process and exit with its code.

    Args:
        is_rank: the command joins a process group. Skip the interpreter's teardown then: now and then a communication
            library's thread is still alive there, which ends a finished run with "terminate called without an active
            exception" and a wrong exit code.
    """
    try:
        code = importlib.import_module(f"megatron_slm.cli.{module}").main()
    except SystemExit as stop:  # argparse, after --help or a usage error
        code = int(stop.code or 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk under the log does not make the command a failed one
            stream.flush()
    if is_rank:
        os._exit(code)
    sys.exit(code)
