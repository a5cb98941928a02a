"""Saves the run during training."""

from __future__ import annotations

import torch.distributed as dist

from megatron_slm.checkpoint.save import Saved
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel.activity import LoopState
from megatron_slm.training.build import Run
from megatron_slm.training.recorder import Recorder


class Checkpointer:
    """Saves the run's state and logs each checkpoint once it is committed. All methods are collective.

    Without --save and --save-interval it does nothing.
    """

    def __init__(self, run: Run, recorder: Recorder, watchdog: Watchdog) -> None:
        self._run, self._recorder, self._watchdog = run, recorder, watchdog
        self._saved_step: int | None = None

    def save(self) -> None:
        """Save the state after the current step, unless this step is saved already."""
        run, step = self._run, self._run.state.step
        if not run.plan.config.checkpoint.enabled or step == self._saved_step:
            return
        self._watchdog.enter(LoopState.SAVING, step)
        more = [] if run.following is None else run.following.files(dist.get_rank())
        self._log(run.saver.save(run.trainer.engine.optimizer, run.state, more))
        self._saved_step = step

    def poll(self) -> None:
        """Commit an asynchronous save if all ranks have written their files."""
        self._log(self._run.saver.poll())

    def finish(self) -> None:
        """Wait until a save under way is committed."""
        self._log(self._run.saver.finish())

    def _log(self, saved: Saved | None) -> None:
        if saved is not None:
            size_mib = saved.num_bytes / 2**20
            self._recorder.log(f"saved {saved.folder} ({size_mib:,.0f} MiB, blocked {saved.blocked_seconds:.2f} s)")
