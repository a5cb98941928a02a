"""Profiles a few steps with torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.config.logging import LoggingConfig
from megatron_slm.device import on_gpu

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles steps from `--profile-step-start` to `--profile-step-end` (exclusive) on `--profile-ranks`.

    Writes RUN_DIR/profile/rank-R-steps-A-B.json.gz, for chrome://tracing or ui.perfetto.dev, and a table of the
    costliest operations (.txt).
    """

    def __init__(self, config: LoggingConfig) -> None:
        self.folder = Path(config.run_dir) / "profile"
        self.first = config.profile_step_start or 0
        self.end = config.profile_step_end or self.first + 2
        self._is_mine = self.first > 0 and dist.get_rank() in config.profile_ranks
        self._profile: Any = None
        self._first_profiled = self._latest = 0

    def begin_step(self, step: int) -> None:
        """Start the profile if `step` (from 1, as in the metrics) is in range; call before every step."""
        self._latest = step
        if self._is_mine and self._profile is None and self.first <= step < self.end:
            self._first_profiled = step  # a resumed run may start inside the range
            activities = [torch.profiler.ProfilerActivity.CPU]
            if on_gpu():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.start()

    def is_last_step(self, step: int) -> bool:
        """Return True on all ranks if `step` is the last to profile; call `close` then."""
        return self.first > 0 and step + 1 == self.end

    def close(self) -> None:
        """Write the profile, if one is open; slow. Also called at the end of a run."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"rank-{dist.get_rank()}-steps-{self._first_profiled}-{self._latest}"
        steps = f"steps {self._first_profiled} to {self._latest}"
        order = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
            table = profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=60)
            (self.folder / f"{name}.txt").write_text(table)
        except OSError as error:
            for path in self.folder.glob(f"{name}.*"):
                path.unlink()
            logger.warning("cannot write the profile of %s: %s", steps, error)
            return
        logger.info("wrote the profile of %s: %s.json.gz", steps, self.folder / name)
