"""Evaluation during training: mean losses of held-out sets, and the texts of --probe-file."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from megatron_slm.analysis.probe_records import ProbeFolder
from megatron_slm.loss.sums import LossSums
from megatron_slm.operations.stopping import StopAskedError, StopRequest
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel.activity import LoopState
from megatron_slm.parallel.collectives import broadcast_from_rank_0
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.telemetry.history import disk_errors
from megatron_slm.telemetry.metrics import evaluation_loss
from megatron_slm.training.build import Run
from megatron_slm.training.intervals import is_due
from megatron_slm.training.recorder import Recorder
from megatron_slm.training.sources import HeldOutSet


class Evaluator:
    """Evaluates the run with its current weights and records the losses. All methods are collective.

    A stop request is answered before each global batch of a held-out set: the evaluation ends there, and the resumed
    run makes up for the rest (`catch_up`).
    """

    def __init__(self, run: Run, recorder: Recorder, watchdog: Watchdog, stop: StopRequest) -> None:
        self._run, self._recorder, self._watchdog, self._stop = run, recorder, watchdog, stop

    def prepare(self) -> None:
        """Prepare the texts of --probe-file and their folder, before the first step."""
        run, step = self._run, self._run.state.step
        if run.text_probe is not None:
            self._watchdog.enter(LoopState.PROBE, step)
            run.text_probe.prepare(resume_step=run.resume_step)
            return
        run_dir = run.plan.config.logging.run_dir
        with raise_on_all_ranks(), disk_errors(run_dir):
            if dist.get_rank() == 0:
                ProbeFolder(run_dir).discard_after(run.resume_step)

    def catch_up(self) -> str | None:
        """Evaluate what is due at the step resumed from and has no record, because the run was killed before.

        Returns:
            the reason of a stop requested meanwhile, else None.
        """
        run, step = self._run, self._run.state.step
        config = run.plan.config
        if step == 0 or not is_due(step, config.logging.eval_interval, config.training.train_iters):
            return None
        reason = self._evaluate(self._without_record())
        if reason is None and run.text_probe is not None and not run.text_probe.is_recorded(step):
            self._measure_texts()
        return reason

    def evaluate(self) -> str | None:
        """Evaluate every held-out set, and the texts of --probe-file.

        Returns:
            the reason of a stop requested meanwhile, else None.

        Raises:
            CorpusError, VocabularyError: a held-out set cannot be read; on every rank.
        """
        reason = self._evaluate(self._due())
        if reason is None:
            self._measure_texts()
            reason = self._stop.agreed(must_stop=self._recorder.error is not None)
        return reason

    def _due(self) -> list[HeldOutSet]:
        """The held-out sets to evaluate after this step: test sets after the last one, or alone, only."""
        run, config = self._run, self._run.plan.config
        is_end = config.logging.eval_only or run.state.step == config.training.train_iters
        return [held_out for held_out in run.held_out if is_end or not held_out.only_at_end]

    def _without_record(self) -> list[HeldOutSet]:
        step, lines = self._run.state.step, self._recorder.resumed_lines
        done = {line["set"] for line in lines if line["step"] == step and line.get("event") == "eval"}
        missing = [held_out.name for held_out in self._due() if held_out.name not in done] if lines else []
        missing = broadcast_from_rank_0(missing)  # which alone has the record
        return [held_out for held_out in self._due() if held_out.name in missing]

    def _evaluate(self, held_out_sets: list[HeldOutSet]) -> str | None:
        run = self._run
        try:
            for held_out in held_out_sets:
                loss = self._mean_loss(held_out)
                if run.plan.config.checkpoint.enabled and dist.get_rank() == 0:
                    run.saver.evaluated(run.state.step, {held_out.name: loss})  # before the line that marks it as done
                self._recorder.evaluation(held_out.name, loss)
        except StopAskedError as asked:
            return str(asked)
        return None

    def _mean_loss(self, held_out: HeldOutSet) -> float | None:
        """Mean loss in nats over the set's valid tokens, each counted once at any layout; None where not finite."""
        run, plan, sums = self._run, self._run.plan, LossSums()
        count = plan.micro_batches_of(plan.eval_batch_size)
        for batch in range(held_out.num_global_batches):
            self._watchdog.enter(LoopState.EVALUATION, run.state.step)
            if (reason := self._stop.agreed()) is not None:
                raise StopAskedError(reason)
            read = partial(held_out.source.micro_batch, batch * plan.eval_batch_size)
            with raise_on_all_ranks():  # before anything is sent, so that no rank waits for one that cannot read
                micro_batches = [read(i) for i in range(count)] if held_out.reads else []
            sums = sums + run.trainer.evaluate(micro_batches.__getitem__, count)
        return evaluation_loss(sums)

    def _measure_texts(self) -> None:
        run = self._run
        if run.text_probe is not None:
            self._watchdog.enter(LoopState.PROBE, run.state.step)
            self._recorder.texts(run.text_probe, run.text_probe.measure(run.state))
