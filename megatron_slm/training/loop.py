"""The training loop: step, record, evaluate, save, stop."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.checkpoint.save import Progress
from megatron_slm.config.load import write_yaml
from megatron_slm.device import local_device
from megatron_slm.errors import SlmError, TrainingError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.collectives import together
from megatron_slm.training.build import Run
from megatron_slm.training.evaluation import evaluate
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.metrics import MetricsWriter, ProgressLine, source_metrics, training_metrics
from megatron_slm.training.probe import Probe, agreement
from megatron_slm.training.signals import StopRequest
from megatron_slm.training.step import StepResult, train_step


def train(run: Run) -> None:
    """Train from where the run stands to `--train-iters`, or until asked to stop. Collective."""
    config, position = run.plan.config, run.position
    last = config.training.train_iters
    stop, skipped_in_a_row = StopRequest(local_device()), 0
    _raise_together(run.train_source.prepare(position.consumed_samples))
    with closing(run.train_source), _Recorder(run) as recorder:
        if run.probe is not None and any(map(run.probe.due, range(position.step + 1, last + 1))):
            run.probe.prepare()
        while position.step < last:
            rate = learning_rate(position.step, config.optimizer, last)
            source = partial(run.train_source.micro_batch, position.consumed_samples)
            is_last = position.step + 1 == last
            result = train_step(run.trainer, source, _settings(run), learning_rate=rate, is_last=is_last)
            _advance(run, result)
            recorder.step(result, rate)
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            _check_finite(skipped_in_a_row, config.training.max_skipped_steps, position.step)
            if run.probe is not None and run.probe.due(position.step):
                recorder.probe(run.probe)  # before saving: what was kept is a part of the checkpoint
            unreadable = run.train_source.prepare(position.consumed_samples)
            stopping = stop.agreed(unreadable is not None)
            if config.checkpoint.enabled and (stopping or _due(position.step, config.checkpoint.save_interval, last)):
                recorder.saved(_save(run))  # before evaluating: what ends a run early does not wait
            if _due(position.step, config.logging.eval_interval, last):
                recorder.evaluations()
            if stopping:
                _raise_together(unreadable)
                recorder.say(f"asked to stop; stopped after step {position.step}")
                break


def _raise_together(error: SlmError | None) -> None:
    """What any rank has is raised on every rank. Collective."""
    with together():
        if error is not None:
            raise error


def _settings(run: Run) -> StepSettings:
    return StepSettings(step=run.position.step, score_threshold=run.position.score_threshold)


def _save(run: Run) -> Path:
    position = run.position
    progress = Progress(
        step=position.step,
        consumed_samples=position.consumed_samples,
        adam_step=position.adam_step,
        score_threshold=position.score_threshold,
        probe_kept=position.probe_kept,
        data=run.plan.train_samples.state(position.consumed_samples) if dist.get_rank() == 0 else {},
    )
    return run.writer.save(run.trainer.engine.optimizer, progress)


def _advance(run: Run, result: StepResult) -> None:
    run.position.step += 1
    run.position.consumed_samples += run.plan.global_batch_size
    run.position.adam_step += not result.skipped
    sums = result.sums
    run.position.score_threshold = run.plan.selector.next_threshold(
        run.position.score_threshold, sums.threshold, sums.threshold_tokens
    )


def _due(step: int, interval: int | None, last: int) -> bool:
    return step == last or (interval is not None and step % interval == 0)


def _check_finite(skipped_in_a_row: int, limit: int, step: int) -> None:
    if skipped_in_a_row >= limit:
        raise TrainingError(
            "gradients",
            f"not finite in {skipped_in_a_row} steps up to step {step}",
            f"are finite in at least one of --max-skipped-steps ({limit}) steps",
            "resume from an earlier checkpoint with a lower --lr, or look at the data of these steps",
        )


class _Recorder:
    """Writes what happens; only rank 0 has anything to write to."""

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.plan.config
        self.writer: MetricsWriter | None = None
        if dist.get_rank() == 0:
            run_dir = Path(config.logging.run_dir)
            self.writer = MetricsWriter(run_dir, resume_step=run.position.step)
            write_yaml(config, run_dir / "config.yaml")
            title = f"{config.selection.objective} {run_dir.name}"
            self.line = ProgressLine(title, config.training.train_iters, start=run.position.step)

    def step(self, result: StepResult, rate: float) -> None:
        """Record a training step."""
        position, plan = self.run.position, self.run.plan
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
            "skipped_steps": position.skipped_steps,
        }
        sources = plan.train_samples.sources
        if len(sources) > 1:
            names, consumed = [s.name for s in sources], plan.train_samples.consumed(position.consumed_samples)
            values["sources"] = source_metrics(result.sums, names, consumed)
        if _due(position.step, plan.config.logging.log_interval, plan.config.training.train_iters):
            self.writer.write(values)
        self.line.update(position.step, values)

    def evaluations(self) -> None:
        """Evaluate every held-out set and record its loss. Collective."""
        run = self.run
        is_end = run.position.step == run.plan.config.training.train_iters
        for held_out in run.held_out:
            if held_out.only_at_end and not is_end:
                continue
            loss = evaluate(
                run.trainer,
                held_out,
                global_batch_size=run.plan.global_batch_size,
                num_micro_batches=run.plan.num_micro_batches,
            )
            if self.writer is not None:
                tokens = run.position.consumed_samples * run.plan.config.data.seq_length
                self.writer.write(
                    {"event": "eval", "step": run.position.step, "tokens": tokens, "set": held_out.name, "loss": loss}
                )
                shown = "not finite" if loss is None else f"{loss:.4f} nats"
                self.line.say(f"step {run.position.step}  held-out {held_out.name}: loss {shown}")

    def probe(self, probe: Probe) -> None:
        """Select on the fixed batch and record how much of the last probe's selection is still kept. Collective."""
        position = self.run.position
        kept = probe.kept(_settings(self.run))
        if self.writer is not None:
            tokens = position.consumed_samples * self.run.plan.config.data.seq_length
            agreed = agreement(position.probe_kept, kept)
            line = {"event": "probe", "step": position.step, "tokens": tokens, "agreement": agreed}
            self.writer.write({**line, "kept_tokens": int(kept.sum())})
        position.probe_kept = kept

    def saved(self, folder: Path) -> None:
        """Record a checkpoint."""
        self.say(f"saved {folder}")

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
