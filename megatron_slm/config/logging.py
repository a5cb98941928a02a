"""What a run writes, and how often it looks at itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run writes and how often it evaluates."""

    run_dir: str = "runs/default"
    """Everything of a run: metrics.jsonl, config.yaml, tensorboard/, checkpoints/."""
    log_interval: int = 1
    """Write metrics every this many steps."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Time parts of a step, for the metrics: 0 none, 1 batches, gradient sync and optimizer, 2 also every kind of
    instruction. A GPU is waited for once a logged step, not while a step runs."""
    eval_interval: int | None = None
    """Evaluate every this many steps, and at the end; default: only at the end."""
    eval_iters: int | None = None
    """Global batches of each held-out set; default: the whole set."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device at the run's precision, for the MFU in the metrics; default: by the GPU's name."""
    profile_step_start: int | None = None
    """Profile from this step on (counted from 1) with torch's profiler, into RUN_DIR/profile/."""
    profile_step_end: int | None = None
    """First step that is no longer profiled; default: two steps after --profile-step-start."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""
    probe_file: str | None = None
    """A few fixed texts (JSON lines with a `text` each, or .txt) whose tokens' losses are recorded at each evaluation,
    in RUN_DIR/probe, and shown in TensorBoard."""

    def __post_init__(self) -> None:
        require_positive(self, "log_interval", "eval_interval", "eval_iters", "peak_tflops", "profile_step_start")
        start, end = self.profile_step_start, self.profile_step_end
        require(
            end is None or (start is not None and end > start),
            "profile_step_end",
            end,
            f"is after --profile-step-start ({start})",
            "give a later step, or leave it out for two steps",
        )
        require(
            min(self.profile_ranks, default=-1) >= 0,
            "profile_ranks",
            self.profile_ranks,
            "are ranks, at least one",
            "give numbers from 0 on",
        )
