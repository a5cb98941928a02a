"""Steps that went wrong: found on all ranks alike, written down with their samples, and bounded in number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch.distributed as dist

from megatron_slm.config.health import HealthConfig
from megatron_slm.data.sampler import sample_indices
from megatron_slm.engine.facts import MicroBatchFacts
from megatron_slm.engine.refusal import Reason
from megatron_slm.engine.trainer import StepResult
from megatron_slm.errors import TrainingError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums
from megatron_slm.parallel.collectives import all_gather_objects
from megatron_slm.telemetry.metrics import BAD_BATCHES
from megatron_slm.training.build import Run


@dataclass(frozen=True, kw_only=True)
class BadBatch:
    """A step that went wrong, and what is known of its samples."""

    step: int
    """Its number, counted from 1 as in the metrics."""
    reason: Reason
    skipped: bool
    """Whether nothing was updated; a spike may have been applied."""
    first_sample: int
    """Its samples are this one and the following ones, by their number in the run's order."""
    num_samples: int
    micro_batch_size: int
    loss_all: float | None
    """Mean loss over valid, finite tokens, in nats."""
    loss_limit: float | None
    """What counted as a spike; None where nothing did."""
    score_threshold: float | None
    """The running threshold of `--slm-policy quantile` that its selection used."""
    micro_batches: list[dict[str, Any]]
    """Each one's number, data-parallel rank, samples, sources, losses and what was not finite in it."""


def spike_limit(losses: Sequence[float], config: HealthConfig) -> float | None:
    """The loss above which the next step is a spike; None where few steps were seen, or none is asked for."""
    if config.loss_spike_sigmas is None or len(losses) < config.loss_spike_window // 2:
        return None
    return fmean(losses) + config.loss_spike_sigmas * pstdev(losses)


def with_loss(losses: Sequence[float], loss: float | None, config: HealthConfig) -> list[float]:
    """The losses to compare the next step with.

    A spike enters as the limit that it went over: one of them does not hide the next one, and a loss that has come to
    stay stops being a spike after a while.
    """
    if config.loss_spike_sigmas is None:
        return []
    if loss is None:
        return list(losses)
    limit = spike_limit(losses, config)
    return [*losses, loss if limit is None else min(loss, limit)][-config.loss_spike_window :]


class Health:
    """Follows the steps of a run. Every rank holds the same."""

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.plan.config.health
        self._in_a_row: list[Reason] = []

    def settings(self) -> StepSettings:
        """What the next step's objective depends on."""
        position = self._run.position
        limit = spike_limit(position.recent_losses, self._config) if self._config.skip_loss_spikes else None
        return StepSettings(step=position.step, score_threshold=position.score_threshold, loss_limit=limit)

    def examine(self, result: StepResult) -> BadBatch | None:
        """What was wrong with the step at hand, before the run's position moves past it. Collective where it was.

        Returns:
            None where nothing was; the same on every rank otherwise.
        """
        position, loss = self._run.position, mean_loss(result.sums)
        limit = spike_limit(position.recent_losses, self._config)
        if result.refused in (None, "loss-spike"):
            position.recent_losses = with_loss(position.recent_losses, loss, self._config)
        self._in_a_row = [*self._in_a_row, result.refused] if result.refused else []
        reason = result.refused
        if reason is None and limit is not None and loss is not None and loss > limit:
            reason = "loss-spike"
        return None if reason is None else self._describe(result, reason, loss, limit)

    def _describe(self, result: StepResult, reason: Reason, loss: float | None, limit: float | None) -> BadBatch:
        run, rank = self._run, dist.get_rank()
        plan, position = run.plan, run.position
        coordinate = plan.topology.coordinate(rank)
        mine = (coordinate.pipeline, coordinate.data, run.trainer.micro_batch_facts())
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for stage, data_rank, facts in all_gather_objects(mine):
            for fact in facts:
                key = (fact.micro_batch, data_rank)
                _merge(found.setdefault(key, self._micro_batch(*key)), fact, stage)
        return BadBatch(
            step=position.step + 1,
            reason=reason,
            skipped=result.skipped,
            first_sample=position.consumed_samples,
            num_samples=plan.global_batch_size,
            micro_batch_size=plan.config.training.micro_batch_size,
            loss_all=loss,
            loss_limit=limit,
            score_threshold=position.score_threshold,
            micro_batches=[found[key] for key in sorted(found)],
        )

    def _micro_batch(self, number: int, data_rank: int) -> dict[str, Any]:
        plan = self._run.plan
        samples = sample_indices(
            self._run.position.consumed_samples,
            number,
            micro_batch_size=plan.config.training.micro_batch_size,
            data_parallel_rank=data_rank,
            data_parallel_size=plan.topology.data,
        )
        sources = [plan.train_samples.sources[plan.train_samples.locate(i)[0]].name for i in samples]
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
        """Whether too many steps in a row were not applied."""
        return len(self._in_a_row) >= self._run.plan.config.training.max_skipped_steps

    def error(self) -> TrainingError:
        """Why the run stops."""
        count, step = len(self._in_a_row), self._run.position.step
        reasons = ", ".join(f"{self._in_a_row.count(r)} x {r}" for r in dict.fromkeys(self._in_a_row))
        saves = self._run.plan.config.checkpoint.enabled
        kept = (
            "the checkpoint just saved has the weights before them and goes on behind them"
            if saves
            else ("no checkpoint was saved, because the run saves none")
        )
        return TrainingError(
            "steps in a row that were not applied",
            f"{count} up to step {step} ({reasons})",
            f"are fewer than --max-skipped-steps ({count}); {kept}",
            f"look at their samples with tools/replay.py {self._run.plan.config.logging.run_dir}/{BAD_BATCHES}, then "
            "resume with a lower --lr, other data or an earlier checkpoint",
        )


def mean_loss(sums: LossSums) -> float | None:
    """Mean loss over valid tokens in nats; None where there is none or it is not finite."""
    loss = sums.valid_loss / sums.valid_tokens if sums.valid_tokens else math.nan
    return loss if math.isfinite(loss) else None


def _merge(entry: dict[str, Any], fact: MicroBatchFacts, stage: int) -> None:
    if fact.sums is not None:
        entry["loss_all"] = mean_loss(fact.sums)
        entry["valid_tokens"] = round(fact.sums.valid_tokens)
        entry["nonfinite_losses"] = round(fact.sums.nonfinite_losses)
        entry["nonfinite_scores"] = round(fact.sums.nonfinite_tokens - fact.sums.nonfinite_losses)
    stages = entry["nonfinite_gradient_below_stages"]
    if fact.gradient_is_finite is False and stage not in stages:
        stages.append(stage)
        stages.sort()
