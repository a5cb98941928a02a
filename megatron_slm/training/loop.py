"""The training loop: step, record, evaluate, save, stop."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.checkpoint.save import Progress, Saved
from megatron_slm.config.load import write_yaml
from megatron_slm.device import local_device
from megatron_slm.errors import CorpusError, SlmError, VocabularyError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.collectives import from_rank_0, together
from megatron_slm.training.build import Run
from megatron_slm.training.evaluation import evaluate
from megatron_slm.training.health import BadBatch, Health
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.metrics import MetricsWriter, ProgressLine, source_metrics, training_metrics
from megatron_slm.training.probe import Probe, agreement
from megatron_slm.training.profiling import StepProfiler
from megatron_slm.training.resources import resources
from megatron_slm.training.signals import StopRequest
from megatron_slm.training.step import StepResult, train_step


def train(run: Run) -> None:
    """Train from where the run stands to `--train-iters`, or until asked to stop. Collective."""
    config, position = run.plan.config, run.position
    last = config.training.train_iters
    stop, health = StopRequest(local_device()), Health(run)
    _raise_together(run.train_source.prepare(position.consumed_samples))
    with closing(run.train_source), closing(StepProfiler(config.logging)) as profiler, _Recorder(run) as recorder:
        if run.probe is not None and any(map(run.probe.due, range(position.step + 1, last + 1))):
            run.probe.prepare()
        recorder.evaluations(recorder.evaluations_cut_off())
        while position.step < last:
            rate = learning_rate(position.step, config.optimizer, last)
            source = partial(run.train_source.micro_batch, position.consumed_samples)
            is_last = position.step + 1 == last
            profiler.before(position.step + 1)
            result = train_step(run.trainer, source, health.settings(), learning_rate=rate, is_last=is_last)
            bad = health.examine(result)
            _advance(run, result)
            profiler.after(position.step)
            recorder.step(result, rate)
            recorder.bad_batch(bad)
            if health.must_stop:  # the weights are those before these steps, the position is behind their samples
                recorder.saved(_save(run) if config.checkpoint.enabled else None)
                recorder.saved(run.saver.finish())
                raise health.error()
            if run.probe is not None and run.probe.due(position.step):
                recorder.probe(run.probe)  # before saving: what was kept is a part of the checkpoint
            with run.trainer.timers.timing("batch-generator"):
                unreadable = run.train_source.prepare(position.consumed_samples)
            stopping = stop.agreed(unreadable is not None)
            recorder.saved(run.saver.poll())
            saves = stopping or _due(position.step, config.checkpoint.save_interval, last)
            if config.checkpoint.enabled and saves:
                recorder.saved(_save(run))  # before evaluating: what ends a run early does not wait
            if stopping:  # what is under way is committed before anything that takes long or can fail
                recorder.saved(run.saver.finish())
                _raise_together(unreadable)
            _evaluate(run, recorder, is_saved=saves)
            if stopping:
                recorder.say(f"asked to stop; stopped after step {position.step}")
                break
        recorder.saved(run.saver.finish())


def _evaluate(run: Run, recorder: _Recorder, *, is_saved: bool) -> None:
    """Evaluate what is due after a step. A set that cannot be read ends the run, with the step saved. Collective."""
    try:
        recorder.evaluations(recorder.evaluations_due())
    except (CorpusError, VocabularyError):  # on every rank alike
        if run.plan.config.checkpoint.enabled and not is_saved:
            recorder.saved(_save(run))
        recorder.saved(run.saver.finish())
        raise


def _raise_together(error: SlmError | None) -> None:
    """What any rank has is raised on every rank. Collective."""
    with together():
        if error is not None:
            raise error


def _save(run: Run) -> Saved | None:
    position = run.position
    progress = Progress(
        step=position.step,
        consumed_samples=position.consumed_samples,
        adam_step=position.adam_step,
        score_threshold=position.score_threshold,
        tokens_seen=position.tokens_seen,
        tokens_kept=position.tokens_kept,
        recent_losses=position.recent_losses,
        probe_kept=position.probe_kept,
        data=run.plan.train_samples.state(position.consumed_samples) if dist.get_rank() == 0 else {},
    )
    return run.saver.save(run.trainer.engine.optimizer, progress)


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


def _due(step: int, interval: int | None, last: int) -> bool:
    return step == last or (interval is not None and step % interval == 0)


class _Recorder:
    """Writes what happens; only rank 0 has anything to write to."""

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.plan.config
        self.writer: MetricsWriter | None = None
        self._logged_step = run.position.step
        with together():  # a monitor may not open
            if dist.get_rank() == 0:
                run_dir = Path(config.logging.run_dir)
                self.writer = MetricsWriter(run_dir, resume_step=run.position.step, monitors=run.plan.monitors)
                write_yaml(config, run_dir / "config.yaml")
                title = f"{config.selection.objective} {run_dir.name}"
                self.line = ProgressLine(title, config.training.train_iters, start=run.position.step)

    def bad_batch(self, bad: BadBatch | None) -> None:
        """Record a step that went wrong, where one did."""
        if bad is not None and self.writer is not None:
            self.writer.bad_batch(asdict(bad))
            last = bad.first_sample + bad.num_samples - 1
            outcome = "not applied" if bad.skipped else "applied all the same"
            self.say(f"warning: step {bad.step}: {bad.reason}, {outcome}; samples {bad.first_sample} to {last}")

    def step(self, result: StepResult, rate: float) -> None:
        """Record a training step. Collective where it is logged."""
        position, plan = self.run.position, self.run.plan
        is_logged = _due(position.step, plan.config.logging.log_interval, plan.config.training.train_iters)
        used: dict[str, Any] = {}
        if is_logged:
            used = resources(self.run.trainer.timers, position.step - self._logged_step)
            self._logged_step = position.step
        if self.writer is None:
            return
        if result.sums.nonfinite_tokens:
            count = f"{result.sums.nonfinite_tokens:,.0f}"
            self.say(f"warning: step {position.step}: {count} tokens with a loss or score that is not finite, not kept")
        tokens_per_step = plan.global_batch_size * plan.config.data.seq_length
        values: dict[str, Any] = {
            "step": position.step,
            "samples": position.consumed_samples,
            "tokens": position.consumed_samples * plan.config.data.seq_length,
            "lr": rate,
            **training_metrics(result, has_reference=plan.has_reference, has_scores=bool(plan.selector.scores)),
            "step_time_seconds": result.seconds,
            "tokens_per_second": tokens_per_step / result.seconds,
            **plan.utilization.metrics(tokens_per_step / result.seconds),
            "skipped_steps": position.skipped_steps,
            **used,
        }
        sources = plan.train_samples.sources
        if len(sources) > 1:
            names, consumed = [s.name for s in sources], plan.train_samples.consumed(position.consumed_samples)
            values["sources"] = source_metrics(result.sums, names, consumed)
        if is_logged:
            self.writer.write(values)
        self.line.update(position.step, values)

    def evaluations(self, names: list[str]) -> None:
        """Evaluate held-out sets and record their losses. Collective."""
        run = self.run
        losses: dict[str, float | None] = {}
        for held_out in run.held_out:
            if held_out.name not in names:
                continue
            loss = evaluate(
                run.trainer,
                held_out,
                global_batch_size=run.plan.global_batch_size,
                num_micro_batches=run.plan.num_micro_batches,
            )
            losses[held_out.name] = loss
            if self.writer is not None:
                tokens = run.position.consumed_samples * run.plan.config.data.seq_length
                self.writer.write(
                    {"event": "eval", "step": run.position.step, "tokens": tokens, "set": held_out.name, "loss": loss}
                )
                shown = "not finite" if loss is None else f"{loss:.4f} nats"
                self.line.say(f"step {run.position.step}  held-out {held_out.name}: loss {shown}")
        if self.writer is not None and losses and run.plan.config.checkpoint.enabled:
            run.saver.evaluated(run.position.step, losses)

    def evaluations_due(self) -> list[str]:
        """Names of the held-out sets to evaluate after the step at hand."""
        run, config, step = self.run, self.run.plan.config, self.run.position.step
        if not _due(step, config.logging.eval_interval, config.training.train_iters):
            return []
        is_end = step == config.training.train_iters
        return [held_out.name for held_out in run.held_out if is_end or not held_out.only_at_end]

    def evaluations_cut_off(self) -> list[str]:
        """Held-out sets that a kill kept from being evaluated after the checkpoint at hand was saved. Collective."""
        missing: list[str] = []
        if self.writer is not None and (lines := self.writer.resumed_lines):
            step = self.run.position.step
            done = {line["set"] for line in lines if line["step"] == step and line.get("event") == "eval"}
            missing = [name for name in self.evaluations_due() if name not in done]
        return from_rank_0(missing)

    def probe(self, probe: Probe) -> None:
        """Select on the fixed batch and record how much of the last probe's selection is still kept. Collective."""
        position = self.run.position
        kept = probe.kept(StepSettings(step=position.step, score_threshold=position.score_threshold))
        if self.writer is not None:
            tokens = position.consumed_samples * self.run.plan.config.data.seq_length
            agreed = agreement(position.probe_kept, kept)
            line = {"event": "probe", "step": position.step, "tokens": tokens, "agreement": agreed}
            self.writer.write({**line, "kept_tokens": int(kept.sum())})
        position.probe_kept = kept

    def saved(self, saved: Saved | None) -> None:
        """Record a checkpoint, where one was committed."""
        if saved is not None:
            size, seconds = saved.num_bytes / 2**20, saved.blocked_seconds
            self.say(f"saved {saved.folder} ({size:,.0f} MiB, training stood still for {seconds:.2f} s)")

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self.writer is not None:
            self.line.say(text)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
            self.line.close()
