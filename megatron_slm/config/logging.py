"""Configuration of metrics, evaluation and profiling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Run folder, metrics, evaluation and profiling."""

    run_dir: str = "runs/default"
    """Folder of the run: metrics.jsonl, config.yaml, tensorboard/, checkpoints/."""
    log_interval: int = 1
    """Log metrics every this many steps."""
    source_log_interval: int | None = None
    """Log the metrics of each corpus of a blend every this many steps, on steps that are logged; each corpus is five
    numbers. Default: --log-interval for up to 100 corpora, else 100 steps."""
    quiet: bool = False
    """Print only warnings and errors on the console. Files are the same."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Timers in the metrics. 0: none. 1: batches, gradient synchronization and optimizer. 2: also each kind of
    pipeline instruction. The GPU is synchronized once per logged step, never during a step."""
    eval_interval: int | None = None
    """Evaluate every this many steps, and at the end. Default: only at the end."""
    eval_at_start: bool = False
    """Evaluate before the first step too, as step 0."""
    eval_only: bool = False
    """Evaluate every held-out set and the texts of --probe-file with the weights of --load or --init-from, and exit:
    nothing is trained or saved, and earlier records in RUN_DIR are kept."""
    eval_iters: int | None = None
    """Number of global batches evaluated per held-out set. Default: the whole set."""
    eval_global_batch_size: int | None = None
    """Samples per global batch of an evaluation, over all ranks; the unit of --eval-iters. Every sample counts once
    with any. Default: that of training, the largest of --step-batch-size-schedule."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device at the run's precision, for the MFU metric. Default: known from the GPU's name."""
    profile_step_start: int | None = None
    """First step to profile, counted from 1, with torch's profiler, into RUN_DIR/profile/."""
    profile_step_end: int | None = None
    """First step no longer profiled. Default: two steps after --profile-step-start."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks to profile."""
    probe_file: str | None = None
    """File of fixed texts (JSON lines with a `text` field, or .txt). At each evaluation, their token losses are logged
    to RUN_DIR/probe and TensorBoard."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "log_interval",
            "source_log_interval",
            "eval_interval",
            "eval_iters",
            "eval_global_batch_size",
            "peak_tflops",
        )
        require_positive(self, "profile_step_start")
        start, end = self.profile_step_start, self.profile_step_end
        require(
            end is None or (start is not None and end > start),
            self,
            "profile_step_end",
            "be used with --profile-step-start" if start is None else f"be above --profile-step-start ({start})",
            "add --profile-step-start" if start is None else "raise it, or remove it to profile two steps",
        )
        require(
            min(self.profile_ranks, default=-1) >= 0,
            self,
            "profile_ranks",
            "contain one or more ranks, each at least 0",
            "use e.g. 0",
        )
