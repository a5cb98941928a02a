"""A profile of a few steps by torch's profiler."""

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
    """Profiles the steps from `--profile-step-start` up to and without `--profile-step-end`, on `--profile-ranks`.

    Writes RUN_DIR/profile/rank-R-steps-A-B.json.gz, for chrome://tracing or ui.perfetto.dev, and a table of the
    costliest operations beside it (.txt).
    """

    def __init__(self, config: LoggingConfig) -> None:
        self.folder = Path(config.run_dir) / "profile"
        self.first = config.profile_step_start or 0
        self.end = config.profile_step_end or self.first + 2
        self._is_mine = self.first > 0 and dist.get_rank() in config.profile_ranks
        self._profile: Any = None
        self._begun = self._last = 0  # the first step that is profiled, and the one that was begun last

    def before(self, step: int) -> None:
        """Tell that `step` is about to begin (counted from 1, as in the metrics)."""
        self._last = step
        if self._is_mine and self._profile is None and self.first <= step < self.end:
            self._begun = step  # a resumed run's first may be beyond the first that was asked for
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] * on_gpu()
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.start()

    def ends_with(self, step: int) -> bool:
        """Whether `step` is the last that is profiled, on any rank; it is time to `close` then."""
        return self.first > 0 and step + 1 == self.end

    def close(self) -> None:
        """Write what was profiled, unless it is written (a run may end before --profile-step-end). It takes a while."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"rank-{dist.get_rank()}-steps-{self._begun}-{self._last}"
        order = f"self_{'cuda' if on_gpu() else 'cpu'}_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
            table = profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=60)
            (self.folder / f"{name}.txt").write_text(table)
        except OSError as error:
            for path in self.folder.glob(f"{name}.*"):
                path.unlink()
            logger.warning("the profile of steps %d to %d cannot be written (%s)", self._begun, self._last, error)
            return
        logger.info("profile of steps %d to %d: %s.json.gz", self._begun, self._last, self.folder / name)
