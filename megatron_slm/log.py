"""Logging setup of the command-line tools: configures the package's own loggers, never the root logger."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_printed: list[BaseException] = []


@dataclass(frozen=True)
class Reports:
    """Folder where the ranks of a launch leave tracebacks, and where they agree on which of them prints an error."""

    folder: Path
    rank: int
    launch: str
    """Name of this launch, the same on all ranks; files of other launches mean nothing."""

    def claim(self, text: str) -> bool:
        """Return True on the first rank that asks for a text, and where the folder cannot be written."""
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        taken = self.folder / f".{self.launch}-{key}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(taken, os.O_CREAT | os.O_EXCL))
        except OSError:
            return not taken.exists()
        return True

    def keep(self, text: str) -> None:
        """Append a text to this rank's file."""
        with suppress(OSError):  # it is on the terminal, or another rank's is
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank:04d}.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")

    def clear(self) -> None:
        """Remove what earlier launches agreed on; on one rank."""
        with suppress(OSError):
            for path in self.folder.glob(".*-*"):
                if not path.name.startswith(f".{self.launch}-"):
                    path.unlink()


_reports: Reports | None = None


def report_in(reports: Reports | None) -> None:
    """Keep this process's tracebacks there, and print only what no other rank has printed; None prints all."""
    global _reports
    _reports = reports


def claim_report(text: str) -> bool:
    """Return True where this process is to print an error: no other rank of the launch has asked for the same text."""
    return _reports is None or _reports.claim(text)


def setup_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Log this package's messages to standard error: from `level` on rank 0, errors only on other ranks.

    DeepSpeed, transformers and torch.distributed log errors only.
    """
    logger = logging.getLogger("megatron_slm")
    logger.handlers.clear()
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False
    for library in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # gloo's all_gather_into_tensor and reduce_scatter_tensor work, yet warn at every call that they are new
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    # of tied embeddings, whose gradients are summed over two stages: nothing is differentiated through that sum
    warnings.filterwarnings("ignore", message="c10d::.*an autograd kernel was not registered")


def print_traceback(error: BaseException) -> None:
    """Print an error's traceback to standard error and flush it, once for each error and once for all ranks.

    Tracebacks through the same lines are one; every rank keeps its own in its file (`report_in`).

    It comes before anything that communicates: on NCCL, leaving a process group waits for kernels that never end once a
    rank has failed, and a launcher ends the process meanwhile.
    """
    if any(error is one for one in _printed):
        return
    _printed.append(error)
    text = "".join(traceback.format_exception(error))
    if _reports is not None:
        _reports.keep(text)
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if claim_report(f"{type(error).__name__} {lines}"):
        sys.stderr.write(text)
        sys.stderr.flush()
