"""Detects bad steps, describes their samples, and stops the run after too many in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch.distributed as dist

from megatron_slm.config.health import HealthConfig
from megatron_slm.data.sampler import sample_indices
from megatron_slm.engine.diagnostics import MicroBatchDiagnostics
from megatron_slm.engine.skipping import SkipReason
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import TrainingError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums
from megatron_slm.parallel.collectives import all_gather_objects
from megatron_slm.telemetry.metrics import BAD_BATCHES
from megatron_slm.training.build import Run


@dataclass(frozen=True, kw_only=True)
class BadBatch:
    """A bad step and its samples, as recorded in bad_batches.jsonl."""

    step: int
    """Counted from 1, as in the metrics."""
    reason: SkipReason
    skipped: bool
    """Nothing was updated; False for a spike that was applied."""
    first_sample: int
    """Number of its first sample in the run's order."""
    num_samples: int
    micro_batch_size: int
    loss_all: float | None
    """Mean loss over valid, finite tokens, in nats."""
    loss_limit: float | None
    """Loss above which the step is a spike; None without a limit."""
    grad_norm: float | None = None
    """Gradient norm before clipping; None where the step was skipped for another reason than its norm."""
    score_threshold: float | None
    """Running threshold of `--slm-policy quantile` in its selection."""
    keep_ratio: float | None = None
    """Keep ratio of `--slm-keep-adaptation` in its selection."""
    micro_batches: list[dict[str, Any]]
    """For each: number, data-parallel rank, samples, sources, losses and counts of non-finite values."""


def spike_limit(losses: Sequence[float], config: HealthConfig) -> float | None:
    """Return the loss above which the next step is a spike; None after too few steps or with detection off."""
    if config.loss_spike_sigmas is None or len(losses) < config.loss_spike_window // 2:
        return None
    return fmean(losses) + config.loss_spike_sigmas * pstdev(losses)


def with_loss(losses: Sequence[float], loss: float | None, config: HealthConfig) -> list[float]:
    """Add a step's loss to the window that the next step is compared with.

    A spike enters as the limit that it exceeded: it does not hide the next one, and a lasting rise of the loss stops
    being a spike after a while.
    """
    if config.loss_spike_sigmas is None:
        return []
    if loss is None:
        return list(losses)
    limit = spike_limit(losses, config)
    return [*losses, loss if limit is None else min(loss, limit)][-config.loss_spike_window :]


class Health:
    """Examines every step of a run; the same on every rank."""

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.plan.config.health
        self._in_a_row: list[SkipReason] = []

    def settings(self) -> StepSettings:
        """Build the settings of the next step's objective."""
        state = self._run.state
        limit = spike_limit(state.recent_losses, self._config) if self._config.skip_loss_spikes else None
        return StepSettings(
            step=state.step,
            score_threshold=state.score_threshold,
            keep_ratio=state.keep_ratio,
            loss_limit=limit,
            norm_limit=self._config.grad_norm_skip_threshold,
            row_shares=tuple(state.row_shares),
        )

    def examine(self, result: StepResult) -> BadBatch | None:
        """Examine a step before the run's state moves past it. Collective for bad steps.

        Returns:
            the description of a bad step, the same on every rank; None for a good one, and for a batch whose tokens
            are all masked, which is neither.
        """
        if result.skip_reason == "no-trained-token":
            return None
        state, loss = self._run.state, mean_loss(result.sums)
        limit = spike_limit(state.recent_losses, self._config)
        if result.skip_reason in (None, "loss-spike"):
            state.recent_losses = with_loss(state.recent_losses, loss, self._config)
        self._in_a_row = [*self._in_a_row, result.skip_reason] if result.skip_reason else []
        reason = result.skip_reason
        if reason is None and limit is not None and loss is not None and loss > limit:
            reason = "loss-spike"
        return None if reason is None else self._describe(result, reason, loss, limit)

    def _describe(self, result: StepResult, reason: SkipReason, loss: float | None, limit: float | None) -> BadBatch:
        run, rank = self._run, dist.get_rank()
        plan, state = run.plan, run.state
        coordinate = plan.topology.coordinate(rank)
        mine = (coordinate.pipeline, coordinate.data, run.trainer.micro_batch_diagnostics())
        found: dict[tuple[int, int], dict[str, Any]] = {}
        sums: dict[tuple[int, int], LossSums] = {}
        for stage, data_rank, facts in all_gather_objects(mine):
            for fact in facts:
                key = (fact.micro_batch, data_rank)
                entry = found.setdefault(key, self._micro_batch(*key))
                if fact.sums is not None:  # several where ranks share its sequences
                    sums[key] = sums[key] + fact.sums if key in sums else fact.sums
                    _describe_losses(entry, sums[key])
                _describe_gradient(entry, fact, stage)
        return BadBatch(
            step=state.step + 1,
            reason=reason,
            skipped=result.skipped,
            first_sample=state.consumed_samples,
            num_samples=plan.batch_sizes.at(state.consumed_samples),
            micro_batch_size=plan.config.training.micro_batch_size,
            loss_all=loss,
            loss_limit=limit,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            score_threshold=state.score_threshold,
            keep_ratio=state.keep_ratio,
            micro_batches=[found[key] for key in sorted(found)],
        )

    def _micro_batch(self, number: int, data_rank: int) -> dict[str, Any]:
        plan = self._run.plan
        samples = sample_indices(
            self._run.state.consumed_samples,
            number,
            micro_batch_size=plan.config.training.micro_batch_size,
            data_parallel_rank=data_rank,
            data_parallel_size=plan.topology.data,
        )
        sources = [plan.data.train.sources[plan.data.train.locate(i)[0]].name for i in samples]
        return {
            "micro_batch": number,
            "data_parallel_rank": data_rank,
            "samples": list(samples),
            "sources": sources,
            "loss_all": None,
            "valid_tokens": None,
            "nonfinite_losses": None,
            "nonfinite_scores": None,
            "nonfinite_gradient_below_stages": [],
        }

    @property
    def must_stop(self) -> bool:
        """True after --max-skipped-steps skipped steps in a row."""
        return len(self._in_a_row) >= self._run.plan.config.training.max_skipped_steps

    def error(self) -> TrainingError:
        """Build the error that stops the run."""
        count, step = len(self._in_a_row), self._run.state.step
        reasons = ", ".join(f"{self._in_a_row.count(r)} x {r}" for r in dict.fromkeys(self._in_a_row))
        saved = "the checkpoint just saved has the weights before them and resumes after their samples"
        if not self._run.plan.config.checkpoint.enabled:
            saved = "no checkpoint was saved, since the run saves none"
        run_dir = self._run.plan.config.logging.run_dir
        return TrainingError(
            "number of steps skipped in a row",
            f"{count} up to step {step} ({reasons})",
            f"be less than --max-skipped-steps ({count}); {saved}",
            f"inspect their samples with tools/replay.py {run_dir}/{BAD_BATCHES}, then resume with a lower --lr, other "
            "data or an earlier checkpoint",
        )


def mean_loss(sums: LossSums) -> float | None:
    """Return the mean loss over valid tokens in nats; None without tokens and where it is not finite."""
    loss = sums.valid_loss / sums.valid_tokens if sums.valid_tokens else math.nan
    return loss if math.isfinite(loss) else None


def _describe_losses(entry: dict[str, Any], sums: LossSums) -> None:
    entry["loss_all"] = mean_loss(sums)
    entry["valid_tokens"] = round(sums.valid_tokens)
    entry["nonfinite_losses"] = round(sums.nonfinite_losses)
    entry["nonfinite_scores"] = round(sums.nonfinite_tokens - sums.nonfinite_losses)


def _describe_gradient(entry: dict[str, Any], fact: MicroBatchDiagnostics, stage: int) -> None:
    stages = entry["nonfinite_gradient_below_stages"]
    if fact.gradient_is_finite is False and stage not in stages:
        stages.append(stage)
        stages.sort()
