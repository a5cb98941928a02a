"""The training loop: step, record, evaluate, save, stop."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.analysis.probe_records import ProbedTexts, ProbeFolder
from megatron_slm.checkpoint.save import Progress, Saved
from megatron_slm.config.load import write_yaml
from megatron_slm.device import local_device
from megatron_slm.errors import SlmError, TrainingError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.collectives import from_rank_0, together
from megatron_slm.training.build import Run
from megatron_slm.training.evaluation import evaluate
from megatron_slm.training.lr_schedule import learning_rate
from megatron_slm.training.metrics import MetricsWriter, ProgressLine, source_metrics, training_metrics
from megatron_slm.training.probe import Probe, agreement
from megatron_slm.training.probe_board import show_record
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
        recorder.evaluations(recorder.evaluations_cut_off())
        recorder.texts_begin()
        while position.step < last:
            rate = learning_rate(position.step, config.optimizer, last)
            source = partial(run.train_source.micro_batch, position.consumed_samples)
            is_last = position.step + 1 == last
            result = train_step(run.trainer, source, _settings(run), learning_rate=rate, is_last=is_last)
            _advance(run, result)
            recorder.step(result, rate)
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if skipped_in_a_row >= config.training.max_skipped_steps:
                recorder.saved(run.saver.finish())
                raise _not_finite(skipped_in_a_row, position.step)
            if run.probe is not None and run.probe.due(position.step):
                recorder.probe(run.probe)  # before saving: what was kept is a part of the checkpoint
            unreadable = run.train_source.prepare(position.consumed_samples)
            stopping = stop.agreed(unreadable is not None)
            recorder.saved(run.saver.poll())
            if config.checkpoint.enabled and (stopping or _due(position.step, config.checkpoint.save_interval, last)):
                recorder.saved(_save(run))  # before evaluating: what ends a run early does not wait
            if stopping:  # what is under way is committed before anything that takes long or can fail
                recorder.saved(run.saver.finish())
                _raise_together(unreadable)
            recorder.evaluations(recorder.evaluations_due())
            recorder.texts()
            if stopping:
                recorder.say(f"asked to stop; stopped after step {position.step}")
                break
        recorder.saved(run.saver.finish())


def _raise_together(error: SlmError | None) -> None:
    """What any rank has is raised on every rank. Collective."""
    with together():
        if error is not None:
            raise error


def _settings(run: Run) -> StepSettings:
    return StepSettings(step=run.position.step, score_threshold=run.position.score_threshold)


def _save(run: Run) -> Saved | None:
    position = run.position
    progress = Progress(
        step=position.step,
        consumed_samples=position.consumed_samples,
        adam_step=position.adam_step,
        score_threshold=position.score_threshold,
        tokens_seen=position.tokens_seen,
        tokens_kept=position.tokens_kept,
        probe_kept=position.probe_kept,
        data=run.plan.train_samples.state(position.consumed_samples) if dist.get_rank() == 0 else {},
    )
    return run.saver.save(run.trainer.engine.optimizer, progress)


def _advance(run: Run, result: StepResult) -> None:
    run.position.step += 1
    run.position.consumed_samples += run.plan.global_batch_size
    run.position.adam_step += not result.skipped
    sums = result.sums
    run.position.count(sums)
    run.position.score_threshold = run.plan.selector.next_threshold(
        run.position.score_threshold, sums.threshold, sums.threshold_tokens
    )


def _due(step: int, interval: int | None, last: int) -> bool:
    return step == last or (interval is not None and step % interval == 0)


def _not_finite(skipped_in_a_row: int, step: int) -> TrainingError:
    return TrainingError(
        "gradients",
        f"not finite in {skipped_in_a_row} steps up to step {step}",
        f"are finite in at least one of --max-skipped-steps ({skipped_in_a_row}) steps",
        "resume from an earlier checkpoint with a lower --lr, or look at the data of these steps",
    )


class _Recorder:
    """Writes what happens; only rank 0 has anything to write to."""

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.plan.config
        self.writer: MetricsWriter | None = None
        self.probed_texts: ProbedTexts
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

    def texts_begin(self) -> None:
        """Make ready for the texts of --probe-file, and for the record that a kill cut off. Collective."""
        run, step = self.run, self.run.position.step
        if run.text_probe is None:
            if self.writer is not None:
                ProbeFolder(run.plan.config.logging.run_dir).go_on_after(step)
            return
        self.probed_texts = run.text_probe.begin(resume_step=step)
        if step and not run.text_probe.is_recorded(step):
            self.texts()

    def texts(self) -> None:
        """Record the losses of the texts of --probe-file, where it is time for it. Collective."""
        run, config = self.run, self.run.plan.config
        if run.text_probe is None or not _due(
            run.position.step, config.logging.eval_interval, config.training.train_iters
        ):
            return
        record = run.text_probe.record(_settings(run))
        if self.writer is not None:
            show_record(self.writer.board, self.probed_texts, record)

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
