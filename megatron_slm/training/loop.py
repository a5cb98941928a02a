"""The training loop: step, record, probe, save, evaluate, stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_slm.device import local_device
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import CorpusError, SlmError, VocabularyError
from megatron_slm.operations.stopping import StopRequest
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel.activity import LoopState
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.telemetry.profiling import StepProfiler
from megatron_slm.training.build import Run
from megatron_slm.training.checkpointing import Checkpointer
from megatron_slm.training.evaluation import Evaluator
from megatron_slm.training.health import Health
from megatron_slm.training.intervals import is_due
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.recorder import Recorder
from megatron_slm.training.step import train_step


def train(run: Run) -> None:
    """Train from the run's state to `--train-iters`, or until asked to stop. Collective over the world.

    Raises:
        SlmError: data cannot be read, records cannot be written, or too many steps were skipped; on every rank, with
            the state saved first if the run saves.
    """
    config, run_dir = run.plan.config, Path(run.plan.config.logging.run_dir)
    stop = StopRequest(local_device(), config.resilience, run_dir)
    longest = 60 * config.parallel.distributed_timeout_minutes if dist.get_backend() == "nccl" else None
    watchdog = Watchdog(run.trainer.activity, config.resilience, run_dir, longest_wait_seconds=longest)
    with (
        watchdog,
        translate_peer_errors("outside of the pipeline's schedule"),
        _barrier_at_end(),
        closing(run.train_source),
        closing(StepProfiler(config.logging)) as profiler,
        Recorder(run) as recorder,
    ):
        _Loop(run, stop, watchdog, profiler, recorder).run()


class _Loop:
    """The loop and what it calls. Every rank runs the same methods in the same order."""

    def __init__(
        self, run: Run, stop: StopRequest, watchdog: Watchdog, profiler: StepProfiler, recorder: Recorder
    ) -> None:
        self._run, self._state, self._config = run, run.state, run.plan.config
        self._last = self._config.training.train_iters
        self._stop, self._watchdog, self._profiler, self._recorder = stop, watchdog, profiler, recorder
        self._health = Health(run)
        self._checkpoints = Checkpointer(run, recorder, watchdog)
        self._evaluator = Evaluator(run, recorder, watchdog, stop)

    def run(self) -> None:
        """Train, step by step; with --eval-only evaluate alone."""
        stopping = self._prepare()
        if self._config.logging.eval_only:
            self._finish(stopping or self._evaluator.evaluate())
            return
        if stopping is None and self._state.step < self._last:
            self._recorder.log(f"training steps {self._state.step + 1} to {self._last}; the first takes longest")
        while self._state.step < self._last and stopping is None:
            self._train_step()
            self._end_profile()
            self._check_health()
            self._probe_selection()
            error = self._read_ahead() or self._recorder.error
            stopping = self._agree_to_stop(must_stop=error is not None)
            self._checkpoints.poll()
            if stopping is not None or is_due(self._state.step, self._config.checkpoint.save_interval, self._last):
                self._checkpoints.save()  # before evaluating, so that an early end does not wait for it
            if stopping is not None:
                self._checkpoints.finish()
                with raise_on_all_ranks():
                    _raise(error)
            elif is_due(self._state.step, self._config.logging.eval_interval, self._last):
                stopping = self._evaluate()
        self._finish(stopping)

    def _prepare(self) -> str | None:
        """Read the first batches, run what the probes need, and make up for evaluations that a kill cut off."""
        with raise_on_all_ranks():  # ranks that read no sample wait for those that build the index of samples
            _raise(self._run.train_source.prepare(self._state.consumed_samples))
        if self._run.selection_probe is not None:
            self._run.selection_probe.prepare(self._state.step, self._last)
        self._evaluator.prepare()
        logging = self._config.logging
        if logging.eval_only:
            return self._stop.agreed()
        if logging.eval_at_start and self._state.step == 0:
            return self._stop.agreed() or self._evaluator.evaluate()
        return self._stop.agreed() or self._evaluator.catch_up()

    def _train_step(self) -> None:
        run, step = self._run, self._state.step
        self._watchdog.enter(LoopState.STEP, step + 1)
        self._profiler.begin_step(step + 1)
        rate = learning_rate(step, self._config.optimizer, self._last)
        source = partial(run.train_source.micro_batch, self._state.consumed_samples)
        size, changes = self._batch_size()
        run.trainer.use_micro_batches(run.plan.micro_batches_of(size))
        is_last = step + 1 == self._last or changes or self._reference_is_used_after(step + 1)
        result = train_step(run.trainer, source, self._health.settings(), learning_rate=rate, is_last=is_last)
        bad = self._health.examine(result)
        self._advance(result, size)
        if run.following is not None and self._config.reference_update.is_due(step + 1):
            run.following.update(run.trainer.engine.module.parameters())
        self._recorder.step(result, rate, size)
        self._recorder.bad_batch(bad)

    def _batch_size(self) -> tuple[int, bool]:
        """Samples of the next step, and whether the one after it has another number, so that no work is done ahead."""
        sizes, consumed = self._run.plan.batch_sizes, self._state.consumed_samples
        size = sizes.at(consumed)
        return size, sizes.at(consumed + size) != size

    def _reference_is_used_after(self, step: int) -> bool:
        """True if the reference changes or is probed after a step, so that it must not run ahead in the step."""
        if self._run.following is None:
            return False
        probe = self._run.selection_probe
        return self._config.reference_update.is_due(step) or (probe is not None and probe.is_due(step))

    def _advance(self, result: StepResult, num_samples: int) -> None:
        """Move the run's state past a step; a skipped one consumes its samples, and may change row shares."""
        state, sums = self._state, result.sums
        if self._run.trainer.rows is not None and result.rows is not None:
            state.row_shares = self._run.trainer.rows.next_shares(state.row_shares, result.rows)
        state.advance(num_samples, None if result.skipped else sums)
        if not result.skipped:
            state.score_threshold = self._run.plan.selector.next_threshold(
                state.score_threshold, sums.threshold, sums.threshold_tokens
            )
            state.keep_adaptation = self._run.plan.selector.next_adaptation(
                state.keep_adaptation, state.step - 1, sums.kept_loss, sums.kept_tokens
            )

    def _end_profile(self) -> None:
        if self._profiler.is_last_step(self._state.step):  # some ranks write a profile, and all of them wait
            self._watchdog.enter(LoopState.PROFILE, self._state.step)
            self._profiler.close()

    def _check_health(self) -> None:
        """Save and stop after too many skipped steps in a row.

        The checkpoint has the weights before these steps and resumes after their samples.
        """
        if self._health.must_stop:
            self._checkpoints.save()
            self._checkpoints.finish()
            raise self._health.error()

    def _probe_selection(self) -> None:
        """Probe where it is due; before saving, since the probe's selection is a part of the state."""
        probe = self._run.selection_probe
        if probe is not None and probe.is_due(self._state.step):
            self._watchdog.enter(LoopState.PROBE, self._state.step)
            self._recorder.selection(probe.measure(self._state))

    def _read_ahead(self) -> SlmError | None:
        """Wait until the next two steps' micro-batches are in memory; this rank's read error."""
        with self._run.trainer.step_timers.timing("batch-generator"):
            return self._run.train_source.prepare(self._state.consumed_samples)

    def _agree_to_stop(self, *, must_stop: bool) -> str | None:
        """The reason to stop after this step, the same on all ranks; None to continue."""
        step_done = None if self._state.step == self._last else self._state.step
        return self._stop.agreed(step_done=step_done, must_stop=must_stop)

    def _evaluate(self) -> str | None:
        """Evaluate; whatever ends the run meanwhile finds this step saved."""
        try:
            stopping = self._evaluator.evaluate()
        except (CorpusError, VocabularyError):
            self._checkpoints.save()
            self._checkpoints.finish()
            raise
        if stopping is not None:
            self._checkpoints.save()
        return stopping

    def _finish(self, stopping: str | None) -> None:
        self._watchdog.enter(LoopState.SAVING, self._state.step)
        self._checkpoints.finish()
        self._watchdog.enter(LoopState.ENDING, self._state.step)
        self._recorder.flush()
        with raise_on_all_ranks():
            _raise(self._recorder.error)
        if stopping is not None:
            self._recorder.log(f"asked to stop ({stopping}); stopped after step {self._state.step}", always=True)
        else:
            self._recorder.finished()


@contextmanager
def _barrier_at_end() -> Iterator[None]:
    """Keep ranks until all have written their files. Collective; does nothing after an error."""
    yield
    dist.barrier()


def _raise(error: SlmError | None) -> None:
    if error is not None:
        raise error
