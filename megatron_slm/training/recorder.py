"""What happens in a run, written down: metrics, held-out losses, checkpoints, and lines on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.analysis.probe_records import ProbedTexts, ProbeFolder
from megatron_slm.checkpoint.save import Saved
from megatron_slm.checkpoint.state import Progress
from megatron_slm.config.load import write_yaml
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import RunFolderError, ServiceError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.operations.stopping import StopAskedError, StopRequest
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel.activity import LoopState
from megatron_slm.parallel.collectives import broadcast_from_rank_0, raise_on_all_ranks
from megatron_slm.telemetry.history import disk_errors
from megatron_slm.telemetry.metrics import MetricsWriter, ProgressLine, source_metrics, training_metrics
from megatron_slm.telemetry.probe_board import show_record
from megatron_slm.telemetry.resources import resources
from megatron_slm.telemetry.stragglers import gather_times
from megatron_slm.training.build import Run
from megatron_slm.training.evaluation import evaluate
from megatron_slm.training.health import BadBatch
from megatron_slm.training.probe import Probe, agreement


def is_due(step: int, interval: int | None, last: int) -> bool:
    """Whether what happens every `interval` steps, and at the end, happens after `step`."""
    return step == last or (interval is not None and step % interval == 0)


def progress_of(run: Run) -> Progress:
    """Where the run stands, as checkpoints say it."""
    position = run.position
    return Progress(
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


class Recorder:
    """Writes what happens; only rank 0 has anything to write to.

    Attributes:
        unwritten: what kept something from being written, or a monitor from taking it; the run cannot go on then, for
            its history would have a gap.
    """

    def __init__(self, run: Run, watchdog: Watchdog, stop: StopRequest) -> None:
        self.run, self.watchdog, self.stop, config = run, watchdog, stop, run.plan.config
        self.writer: MetricsWriter | None = None
        self.unwritten: RunFolderError | ServiceError | None = None
        self.probed_texts: ProbedTexts
        self._utilization = run.plan.utilization
        self._logged_step, self._step_seconds, self._last = run.position.step, 0.0, config.training.train_iters
        with raise_on_all_ranks(), disk_errors(run.plan.config.logging.run_dir):  # a monitor may not open
            if dist.get_rank() == 0:
                run_dir = Path(config.logging.run_dir)
                self.writer = MetricsWriter(run_dir, resume_step=run.position.step, monitors=run.plan.monitors)
                write_yaml(config, run_dir / "config.yaml")
                title = f"{config.selection.objective} {run_dir.name}"
                self.line = ProgressLine(title, config.training.train_iters, start=run.position.step)

    def bad_batch(self, bad: BadBatch | None) -> None:
        """Record a step that went wrong, where one did."""
        if bad is not None and self.writer is not None:
            with self._recording():
                self.writer.bad_batch(asdict(bad))
            last = bad.first_sample + bad.num_samples - 1
            outcome = "not applied" if bad.skipped else "applied all the same"
            self.say(f"warning: step {bad.step}: {bad.reason}, {outcome}; samples {bad.first_sample} to {last}")

    def step(self, result: StepResult, rate: float) -> None:
        """Record a training step. Collective."""
        position, plan = self.run.position, self.run.plan
        self._step_seconds += result.seconds
        used = self._used() if is_due(position.step, plan.config.logging.log_interval, self._last) else None
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
            **self._utilization.metrics(tokens_per_step / result.seconds),
            "skipped_steps": position.skipped_steps,
        }
        sources = plan.train_samples.sources
        if len(sources) > 1:
            names, consumed = [s.name for s in sources], plan.train_samples.consumed(position.consumed_samples)
            values["sources"] = source_metrics(result.sums, names, consumed)
        if used is not None:
            self._write({**values, **used})
        self.line.update(position.step, values)

    def _used(self) -> dict[str, Any]:
        """Memory and times since this was last asked. Collective."""
        step, timers = self.run.position.step, self.run.trainer.timers
        seconds, num_steps = timers.read(), step - self._logged_step
        self._logged_step = step
        times = gather_times(
            sum(seconds.get(name, 0.0) for name in timers.work) / num_steps,
            self._step_seconds / num_steps,
            self.run.plan.topology,
        )
        self._step_seconds = 0.0
        return {**resources(seconds, timers.names, num_steps), "ranks": times.metrics()}

    def evaluations(self, names: list[str]) -> str | None:
        """Evaluate held-out sets and record their losses; why a stop was asked for meanwhile, else None. Collective."""
        try:
            self._evaluate(names)
        except StopAskedError as asked:
            return str(asked)
        return None

    def _before_batch(self) -> None:
        self.watchdog.enter(LoopState.EVALUATION, self.run.position.step)
        if (reason := self.stop.agreed()) is not None:
            raise StopAskedError(reason)

    def _evaluate(self, names: list[str]) -> None:
        run = self.run
        for held_out in run.held_out:
            if held_out.name not in names:
                continue
            loss = evaluate(
                run.trainer,
                held_out,
                global_batch_size=run.plan.global_batch_size,
                num_micro_batches=run.plan.num_micro_batches,
                before_batch=self._before_batch,
            )
            if self.writer is not None:
                if run.plan.config.checkpoint.enabled:  # before the line that says it is done
                    run.saver.evaluated(run.position.step, {held_out.name: loss})
                tokens = run.position.consumed_samples * run.plan.config.data.seq_length
                self._write(
                    {"event": "eval", "step": run.position.step, "tokens": tokens, "set": held_out.name, "loss": loss}
                )
                shown = "not finite" if loss is None else f"{loss:.4f} nats"
                self.line.say(f"step {run.position.step}  held-out {held_out.name}: loss {shown}")

    def evaluations_due(self) -> list[str]:
        """Names of the held-out sets to evaluate after the step at hand."""
        run, config, step = self.run, self.run.plan.config, self.run.position.step
        if not is_due(step, config.logging.eval_interval, config.training.train_iters):
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
        return broadcast_from_rank_0(missing)

    def texts_begin(self) -> None:
        """Make ready for the texts of --probe-file, and for the record that a kill cut off. Collective."""
        run, step = self.run, self.run.position.step
        if run.text_probe is None:
            with raise_on_all_ranks(), disk_errors(run.plan.config.logging.run_dir):
                if self.writer is not None:
                    ProbeFolder(run.plan.config.logging.run_dir).go_on_after(step)
            return
        self.watchdog.enter(LoopState.PROBE, step)
        self.probed_texts = run.text_probe.begin(resume_step=step)
        if step and not run.text_probe.is_recorded(step):
            self.texts()

    def texts(self) -> None:
        """Record the losses of the texts of --probe-file, where it is time for it. Collective."""
        run, position = self.run, self.run.position
        if run.text_probe is None or not is_due(position.step, run.plan.config.logging.eval_interval, self._last):
            return
        self.watchdog.enter(LoopState.PROBE, position.step)
        record = run.text_probe.record(StepSettings(step=position.step, score_threshold=position.score_threshold))
        if self.writer is not None:
            with self._recording():
                run.text_probe.folder.write(record)
                show_record(self.writer.board, self.probed_texts, record)

    def probe(self, probe: Probe) -> None:
        """Select on the fixed batch and record how much of the last probe's selection is still kept. Collective."""
        position = self.run.position
        self.watchdog.enter(LoopState.PROBE, position.step)
        kept = probe.kept(StepSettings(step=position.step, score_threshold=position.score_threshold))
        if self.writer is not None:
            tokens = position.consumed_samples * self.run.plan.config.data.seq_length
            agreed = agreement(position.probe_kept, kept)
            line = {"event": "probe", "step": position.step, "tokens": tokens, "agreement": agreed}
            self._write({**line, "kept_tokens": int(kept.sum())})
        position.probe_kept = kept

    def save(self) -> None:
        """Save where the run saves at all. Collective."""
        if self.run.plan.config.checkpoint.enabled:
            self.watchdog.enter(LoopState.SAVING, self.run.position.step)
            self.saved(self.run.saver.save(self.run.trainer.engine.optimizer, progress_of(self.run)))

    def saved(self, saved: Saved | None) -> None:
        """Record a checkpoint, where one was committed."""
        if saved is not None:
            size, seconds = saved.num_bytes / 2**20, saved.blocked_seconds
            self.say(f"saved {saved.folder} ({size:,.0f} MiB, training stood still for {seconds:.2f} s)")

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self.writer is not None:
            self.line.say(text)

    def flush(self) -> None:
        """Have everything written."""
        if self.writer is not None:
            with self._recording():
                self.writer.flush()

    def _write(self, line: dict[str, Any]) -> None:
        if self.writer is not None:
            with self._recording():
                self.writer.write(line)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Rank 0 alone learns what a disk or a service says: it is kept until all ranks agree to stop."""
        try:
            with disk_errors(self.run.plan.config.logging.run_dir):
                yield
        except (RunFolderError, ServiceError) as error:
            self.unwritten = self.unwritten or error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            with self._recording():
                self.writer.close()
            self.line.close()
