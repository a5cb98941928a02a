"""Logging, set up once by a tool: the package's own loggers only, never the root logger."""

from __future__ import annotations

import logging
import warnings


def setup_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Show this package's messages on standard error: rank 0 from `level` on, others errors only.

    Libraries that talk a lot at start (DeepSpeed, torch's deprecation notices) are turned down to warnings.
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
    # gloo's all_gather_into_tensor and reduce_scatter_tensor work, yet announce at every call that they are new
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
