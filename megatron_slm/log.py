"""Logging setup of the command-line tools: configures the package's own loggers, never the root logger."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings

_printed: list[BaseException] = []


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
    """Print an error's traceback to standard error and flush it, once for each error.

    It comes before anything that communicates: on NCCL, leaving a process group waits for kernels that never end once a
    rank has failed, and a launcher ends the process meanwhile.
    """
    if any(error is one for one in _printed):
        return
    _printed.append(error)
    traceback.print_exception(error)
    sys.stderr.flush()
