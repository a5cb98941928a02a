"""The training loop: step, record, evaluate, save, stop."""

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
from megatron_slm.parallel.collectives import raise_on_all_ranks, translate_peer_errors
from megatron_slm.telemetry.profiling import StepProfiler
from megatron_slm.training.build import Run
from megatron_slm.training.health import Health
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.recorder import Recorder, is_due
from megatron_slm.training.step import train_step


def train(run: Run) -> None:
    """Train from where the run stands to `--train-iters`, or until asked to stop. Collective."""
    config, position = run.plan.config, run.position
    last, run_dir = config.training.train_iters, Path(config.logging.run_dir)
    stop = StopRequest(local_device(), config.resilience, run_dir)
    watchdog = Watchdog(run.trainer.activity, config.resilience, run_dir)
    health = Health(run)
    with (
        watchdog,
        translate_peer_errors(_OUTSIDE),
        _leaving_together(),
        closing(run.train_source),
        closing(StepProfiler(config.logging)) as profiler,
        Recorder(run, watchdog, stop) as recorder,
    ):
        _raise_together(run.train_source.prepare(position.consumed_samples))
        if run.probe is not None and any(map(run.probe.due, range(position.step + 1, last + 1))):
            run.probe.prepare()
        stopping = stop.agreed() or recorder.evaluations(recorder.evaluations_cut_off())
        recorder.texts_begin()
        while position.step < last and not stopping:
            watchdog.enter(LoopState.STEP, position.step + 1)
            rate, is_last = learning_rate(position.step, config.optimizer, last), position.step + 1 == last
            source = partial(run.train_source.micro_batch, position.consumed_samples)
            profiler.before(position.step + 1)
            result = train_step(run.trainer, source, health.settings(), learning_rate=rate, is_last=is_last)
            bad = health.examine(result)
            _advance(run, result)
            if profiler.ends_with(position.step):  # on some ranks; all of them wait
                watchdog.enter(LoopState.PROFILE, position.step)
                profiler.close()
            recorder.step(result, rate)
            recorder.bad_batch(bad)
            if health.must_stop:  # the weights are those before these steps, the position is behind their samples
                recorder.save()
                recorder.saved(run.saver.finish())
                raise health.error()
            if run.probe is not None and run.probe.due(position.step):
                recorder.probe(run.probe)  # before saving: what was kept is a part of the checkpoint
            with run.trainer.timers.timing("batch-generator"):
                unreadable = run.train_source.prepare(position.consumed_samples)
            must_stop = unreadable is not None or recorder.unwritten is not None
            stopping = stop.agreed(step_done=None if is_last else position.step, must_stop=must_stop)
            recorder.saved(run.saver.poll())
            saves = stopping is not None or is_due(position.step, config.checkpoint.save_interval, last)
            if saves:
                recorder.save()  # before evaluating: what ends a run early does not wait
            if stopping is None:
                if is_due(position.step, config.logging.eval_interval, last):
                    stopping = _evaluate(run, recorder, stop, is_saved=saves)
            else:  # what is under way is committed before anything that can fail
                recorder.saved(run.saver.finish())
                _raise_together(unreadable or recorder.unwritten)
        watchdog.enter(LoopState.SAVING, position.step)
        recorder.saved(run.saver.finish())
        watchdog.enter(LoopState.ENDING, position.step)
        recorder.flush()
        _raise_together(recorder.unwritten)
        if stopping is not None:
            recorder.say(f"asked to stop ({stopping}); stopped after step {position.step}")


_OUTSIDE = "outside of the pipeline's schedule"


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Nobody leaves while another still writes: a metrics service, a profile. Collective, where nothing was raised."""
    yield
    dist.barrier()


def _evaluate(run: Run, recorder: Recorder, stop: StopRequest, *, is_saved: bool) -> str | None:
    """Evaluate what is due; what ends a run meanwhile finds the step saved, and the resumed run makes up for the rest.

    Collective.

    Returns:
        why a stop was asked for meanwhile; None where none was.

    Raises:
        CorpusError, VocabularyError: a held-out set cannot be read; on every rank alike.
    """
    try:
        stopping = recorder.evaluations(recorder.evaluations_due())
    except (CorpusError, VocabularyError):
        if not is_saved:
            recorder.save()
        recorder.saved(run.saver.finish())
        raise
    if stopping is None:
        recorder.texts()
        stopping = stop.agreed(must_stop=recorder.unwritten is not None)
    if stopping is not None and not is_saved:
        recorder.save()
    return stopping


def _raise_together(error: SlmError | None) -> None:
    """What any rank has is raised on every rank. Collective."""
    with raise_on_all_ranks():
        if error is not None:
            raise error


def _advance(run: Run, result: StepResult) -> None:
    run.position.step += 1
    run.position.consumed_samples += run.plan.global_batch_size
    if result.skipped:
        return
    run.position.adam_step += 1
    sums = result.sums
    run.position.count(sums)
    run.position.score_threshold = run.plan.selector.next_threshold(
        run.position.score_threshold, sums.threshold, sums.threshold_tokens
    )
