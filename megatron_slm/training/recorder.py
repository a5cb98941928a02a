"""Records a run: metrics, bad batches and console output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.analysis.probe_records import ProbeRecord
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import RunFolderError, ServiceError
from megatron_slm.flags.load import write_yaml
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.telemetry.history import disk_errors
from megatron_slm.telemetry.metrics import MetricsWriter, describe_weak_reference, source_metrics, training_metrics
from megatron_slm.telemetry.probe_board import show_record
from megatron_slm.telemetry.progress import ProgressLine
from megatron_slm.telemetry.resources import resources
from megatron_slm.telemetry.stragglers import gather_times
from megatron_slm.training.build import Run
from megatron_slm.training.health import BadBatch
from megatron_slm.training.intervals import is_due
from megatron_slm.training.selection_probe import SelectionChange
from megatron_slm.training.text_probe import TextProbe

FEW_SOURCES = 100
"""Corpora of a blend whose metrics are logged with every line."""
SOURCE_STEPS = 100
"""Steps between the metrics of more corpora: a thousand of them take 0.4 s and 0.4 MB."""
MOST_ADDED_VARIANCE = 0.1
"""Mean over blocks, relative to the squared norm of the gradient, above which a run warns."""


class Recorder:
    """Writes metrics.jsonl, TensorBoard, the monitors and the console, on rank 0.

    Attributes:
        error: the first error of a disk or a service that did not take a record. The run must stop at the next
            opportunity, for its history has a gap. None on the other ranks.
    """

    def __init__(self, run: Run) -> None:
        self._run, config = run, run.plan.config
        self.error: RunFolderError | ServiceError | None = None
        self._writer: MetricsWriter | None = None
        self._utilization = run.plan.utilization
        self._logged_step, self._step_seconds = run.state.step, 0.0
        self._clipped: list[bool] = []
        """True for each clipped step since the last logged line."""
        self._is_noisy = False
        self._watches_spread = any(score.is_excess for score in run.plan.selector.scores)
        with raise_on_all_ranks(), disk_errors(config.logging.run_dir):  # a monitor may not open
            if dist.get_rank() == 0:
                run_dir = Path(config.logging.run_dir)
                self._writer = MetricsWriter(run_dir, resume_step=run.resume_step, monitors=run.plan.monitors)
                if not config.logging.eval_only:
                    write_yaml(config, run_dir / "config.yaml")
                title = f"{config.selection.objective} {run_dir.name}"
                self._line = ProgressLine(
                    title, config.training.train_iters, start=run.state.step, quiet=config.logging.quiet
                )

    @property
    def resumed_lines(self) -> list[dict[str, Any]]:
        """Metrics up to the step that the run resumes from; empty on the other ranks."""
        return self._writer.resumed_lines if self._writer is not None else []

    def step(self, result: StepResult, learning_rate: float, num_samples: int) -> None:
        """Record a training step of so many samples. Collective."""
        state, plan = self._run.state, self._run.plan
        self._step_seconds += result.seconds
        self._clipped.append(0.0 < plan.config.optimizer.clip_grad < result.grad_norm and not result.skipped)
        is_logged = is_due(state.step, plan.config.logging.log_interval, plan.config.training.train_iters)
        used = self._take_resources() if is_logged else None
        if self._writer is None:
            return
        if result.sums.nonfinite_tokens:
            count = f"{result.sums.nonfinite_tokens:,.0f}"
            self.log(f"warning: step {state.step}: dropped {count} tokens with a non-finite loss or score", always=True)
        if result.skip_reason == "no-trained-token":
            self.log(f"warning: step {state.step}: all tokens of the batch are masked, nothing updated", always=True)
        values = self._training_line(result, learning_rate, num_samples)
        if used is not None and self._logs_sources():
            values["sources"] = self._source_metrics(result)
        self._warn_of_variance(values["backward_added_variance"])
        self._warn_of_weak_reference(values["excess_spread"])
        if used is not None:
            self._write({**values, **used})
            self._clipped.clear()
        self._line.update(state.step, values)

    def _training_line(self, result: StepResult, learning_rate: float, num_samples: int) -> dict[str, Any]:
        state, plan = self._run.state, self._run.plan
        tokens_per_second = num_samples * plan.config.data.seq_length / result.seconds
        return {
            "step": state.step,
            "samples": state.consumed_samples,
            "tokens": self._tokens,
            "lr": learning_rate,
            **training_metrics(
                result,
                has_reference=plan.has_reference,
                has_scores=bool(plan.selector.scores),
                distills=plan.config.distillation.distills,
            ),
            "step_time_seconds": result.seconds,
            "tokens_per_second": tokens_per_second,
            **self._utilization.metrics(tokens_per_second),
            "skipped_steps": state.skipped_steps,
            "clipped_share": sum(self._clipped) / len(self._clipped) if plan.config.optimizer.clip_grad else None,
        }

    def _logs_sources(self) -> bool:
        config, count = self._run.plan.config, len(self._run.plan.data.train.sources)
        interval = config.logging.source_log_interval or (1 if count <= FEW_SOURCES else SOURCE_STEPS)
        return count > 1 and is_due(self._run.state.step, interval, config.training.train_iters)

    def _source_metrics(self, result: StepResult) -> dict[str, dict[str, Any]]:
        samples = self._run.plan.data.train
        consumed = samples.consumed(self._run.state.consumed_samples)
        return source_metrics(result.sums, [source.name for source in samples.sources], consumed)

    def _warn_of_variance(self, variance: float | None) -> None:
        """Warn when the variance added by row sampling rises above `MOST_ADDED_VARIANCE`."""
        was, self._is_noisy = self._is_noisy, variance is not None and variance > MOST_ADDED_VARIANCE
        if self._is_noisy and not was:
            self.log(
                f"warning: step {self._run.state.step}: row sampling adds {variance:.2f} of the gradient's squared "
                f"norm as variance (recommended: below {MOST_ADDED_VARIANCE}); raise --backward-row-share, or use "
                "--backward-row-variance 0.02"
            )

    def _warn_of_weak_reference(self, spread: float | None) -> None:
        """Warn once of excess losses that differ by no more than rounding."""
        text = describe_weak_reference(spread, self._run.plan.dtype) if self._watches_spread else None
        if text is not None:
            self._watches_spread = False
            self.log(f"warning: step {self._run.state.step}: {text}", always=True)

    def _take_resources(self) -> dict[str, Any]:
        """Memory and times since the last logged step. Collective."""
        step, timers = self._run.state.step, self._run.trainer.step_timers
        seconds, num_steps = timers.read(), step - self._logged_step
        times = gather_times(
            sum(seconds.get(name, 0.0) for name in timers.work) / num_steps,
            self._step_seconds / num_steps,
            self._run.plan.topology,
        )
        self._logged_step, self._step_seconds = step, 0.0
        return {**resources(seconds, timers.names, num_steps), "ranks": times.metrics()}

    def bad_batch(self, bad: BadBatch | None) -> None:
        """Record a bad step; None records nothing."""
        if bad is None or self._writer is None:
            return
        with self._keeping_errors():
            self._writer.bad_batch(asdict(bad))
        last = bad.first_sample + bad.num_samples - 1
        outcome = "skipped" if bad.skipped else "applied"
        self.log(
            f"warning: step {bad.step}: {bad.reason}, {outcome}; samples {bad.first_sample} to {last}", always=True
        )

    def evaluation(self, name: str, loss: float | None) -> None:
        """Record the mean loss of a held-out set in nats; None where it is not finite."""
        step = self._run.state.step
        self._write({"event": "eval", "step": step, "tokens": self._tokens, "set": name, "loss": loss})
        shown = "not finite" if loss is None else f"{loss:.4f} nats"
        self.log(f"step {step}  held-out {name}: loss {shown}")

    def texts(self, probe: TextProbe, record: ProbeRecord) -> None:
        """Record the token losses of the texts of --probe-file."""
        if self._writer is not None:
            with self._keeping_errors():
                probe.folder.write(record)
                show_record(self._writer.board, probe.texts, record)

    def selection(self, change: SelectionChange) -> None:
        """Record a probe of the selection."""
        line = {"event": "probe", "step": self._run.state.step, "tokens": self._tokens}
        self._write({**line, "agreement": change.agreement, "kept_tokens": change.kept_tokens})

    def log(self, text: str, *, always: bool = False) -> None:
        """Print a line on the console; `always` prints it with --quiet too."""
        if self._writer is not None:
            self._line.print(text, always=always)

    def finished(self) -> None:
        """Print what a complete run made, and the commands that continue from it."""
        state, config = self._run.state, self._run.plan.config
        run_dir = config.logging.run_dir
        if config.logging.eval_only:
            self.log(f"evaluated step {state.step}; nothing was trained or saved")
            return
        kept = "" if state.tokens_kept is None else f", trained on {state.tokens_kept:,} tokens"
        self.log(f"finished step {state.step}{kept}; made {run_dir}: metrics.jsonl, tensorboard/, config.yaml")
        self.log(f"  compare runs:  slm-report {run_dir}")
        if config.checkpoint.enabled:
            folder = config.save_folder
            self.log(f"  export:        slm-convert export --load {folder} --output {Path(run_dir) / 'hf'}")
        else:
            self.log("  no checkpoint was saved: add --save-interval to keep the model")

    def flush(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            with self._keeping_errors():
                self._writer.flush()

    @property
    def _tokens(self) -> int:
        """Tokens of all samples so far."""
        return self._run.state.consumed_samples * self._run.plan.config.data.seq_length

    def _write(self, line: dict[str, Any]) -> None:
        if self._writer is not None:
            with self._keeping_errors():
                self._writer.write(line)

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """Keep a write error until all ranks agree to stop, since only rank 0 has it."""
        try:
            with disk_errors(self._run.plan.config.logging.run_dir):
                yield
        except (RunFolderError, ServiceError) as error:
            self.error = self.error or error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with self._keeping_errors():
                self._writer.close()
            self._line.close()
