"""Replays the micro-batches of bad steps one by one with a checkpoint's weights, without changing them.

A step with a learning rate of 0 leaves the weights unchanged, bit for bit, and has a gradient norm. All data-parallel
ranks read the same micro-batch, so that the norm is that micro-batch's own, at any layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.backward import BackwardConfig
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.data.corpus.inspection import MASKED_CLOSE, MASKED_OPEN
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.errors import ConfigError, TrainingError
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.collectives import all_gather_objects
from megatron_slm.run.corpora import boundaries
from megatron_slm.run.plan import Plan, make_plan
from megatron_slm.run.resume import Resume, open_resume
from megatron_slm.training.build import Run, build_run
from megatron_slm.training.health import BadBatch, mean_loss
from megatron_slm.training.step import train_step
from megatron_slm.types import MicroBatch, positions_of

Seen = tuple[MicroBatch, Tensor, Tensor | None, Tensor]
"""A micro-batch, its token losses and reference losses, and its kept rows (`Observer`)."""


@dataclass(frozen=True, kw_only=True)
class SampleReplay:
    """Losses of one sample with the weights of the replay, in nats; None where no token has a finite one."""

    sample: int
    source: str
    loss_all: float | None
    """Mean over valid tokens."""
    worst_loss: float | None
    """Highest loss of a valid token; None where one is not finite."""
    worst_position: int
    """Position of that label, or of the first one with a non-finite loss or reference loss."""
    reference_loss: float | None
    nonfinite_losses: int
    nonfinite_references: int
    kept_tokens: int
    valid_tokens: int


@dataclass(frozen=True, kw_only=True)
class MicroBatchReplay:
    """A replayed micro-batch."""

    samples: tuple[SampleReplay, ...]
    loss: float | None
    """Mean over kept tokens."""
    loss_all: float | None
    recorded_loss_all: float | None
    """`loss_all` in the run's record; None where the run cut other micro-batches, or it was not finite."""
    nonfinite_losses: int
    nonfinite_scores: int
    grad_norm: float | None
    """Norm of the gradient of its mean loss over kept tokens; None where it is not finite or there is none."""
    skip_reason: str | None
    """Reason to skip a step on this micro-batch alone; None to apply it."""
    nonfinite_gradient_below_stages: list[int]


def read_records(word: str) -> list[BadBatch]:
    """Read the records of `FILE[:STEPS]`; STEPS is like `17,20-22`, and all by default.

    Raises:
        ConfigError: the file cannot be read or has no record of such a step.
    """
    path, colon, steps = word.rpartition(":")
    if not colon or Path(word).exists():
        path, steps = word, ""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        names = {f.name for f in fields(BadBatch)}
        records = [BadBatch(**{name: value for name, value in line.items() if name in names}) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        rule, fix = f"be a readable bad_batches.jsonl of a run ({why})", "pass RUN_DIR/bad_batches.jsonl[:STEPS] first"
        raise ConfigError("records", path, rule, fix) from error
    wanted = {record.step for record in records} if not steps else set(_steps(steps))
    missing = sorted(wanted - {record.step for record in records})
    if missing or not records:
        there = ", ".join(str(record.step) for record in records) or "none"
        raise ConfigError("records", word, f"name recorded steps of {path} ({there})", "choose among these")
    return [record for record in records if record.step in wanted]


def _steps(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError("records: steps", text, "list steps like 17,20-22", "correct it")
        yield from range(int(first), int(last or first) + 1)


def open_weights(config: RunConfig) -> Resume | None:
    """Open the checkpoint of `--load`, of a finished run too. Collective.

    Raises:
        CheckpointError: see `open_resume`.
    """
    longer = replace(config.training, train_iters=config.training.train_iters + 1)
    return open_resume(replace(config, training=longer))


class Replay:
    """A run that replays single micro-batches and saves nothing. Collective, as all its methods.

    Args:
        config: the run's.
        resume: the checkpoint to load weights from; None uses the run's initial weights.
        scratch: a folder for the files that a run writes.

    Raises:
        SlmError: see `make_plan`.
    """

    def __init__(self, config: RunConfig, resume: Resume | None, scratch: Path) -> None:
        self.plan = _alone(
            make_plan(_quiet(config, scratch), dist.get_world_size(), rank=dist.get_rank(), resume=resume)
        )
        self._seen: list[Seen] = []
        self.run: Run = build_run(self.plan, observer=lambda *seen: self._seen.append(seen))
        self._source = MicroBatchSource(
            self.plan.data.train,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
            vocab_size=self.plan.models.num_tokens,
            boundaries=boundaries(config, self.plan.models.tokenizer),
        )

    def batch(self, record: BadBatch) -> list[MicroBatchReplay]:
        """Replay every micro-batch of a recorded step; the same results on every rank.

        Raises:
            TrainingError: the configured run does not draw these samples.
        """
        size = self.plan.config.training.micro_batch_size
        if record.first_sample + record.num_samples > len(self.plan.data.train) or record.num_samples % size:
            raise TrainingError(
                f"samples of step {record.step}",
                f"{record.first_sample} and the following {record.num_samples - 1}",
                f"be among the run's {len(self.plan.data.train)}, in whole micro-batches of {size}",
                "pass the run's own configuration (RUN_DIR/config.yaml)",
            )
        recorded = {tuple(part["samples"]): part["loss_all"] for part in record.micro_batches}
        return [self._micro_batch(record, i, recorded) for i in range(record.num_samples // size)]

    def _micro_batch(
        self, record: BadBatch, number: int, recorded: dict[tuple[int, ...], float | None]
    ) -> MicroBatchReplay:
        settings = StepSettings(
            step=record.step - 1, score_threshold=record.score_threshold, keep_ratio=record.keep_ratio
        )
        read = partial(self._source.micro_batch, record.first_sample + number * self._source.samples_together)
        self._seen.clear()
        result = train_step(self.run.trainer, read, settings, learning_rate=0.0, is_last=True)
        coordinate = self.plan.topology.coordinate(dist.get_rank())
        below = any(fact.gradient_is_finite is False for fact in self.run.trainer.micro_batch_diagnostics())
        sources = self.plan.data.train.sources
        is_first = coordinate.data == coordinate.tensor == 0  # the others see the same
        mine = [_on_host(*seen) for seen in self._seen] if is_first else []
        everyones = all_gather_objects((coordinate.pipeline if below else None, mine))
        seen = _put_together([part for _, found in everyones for part in found], self.plan.config.data.seq_length)
        samples = _samples(*seen, names=[source.name for source in sources])
        sums, copies = result.sums, self.plan.topology.data
        return MicroBatchReplay(
            samples=samples,
            loss=sums.weighted_loss / sums.kept_tokens if sums.kept_tokens else None,
            loss_all=mean_loss(sums),
            recorded_loss_all=recorded.get(tuple(sample.sample for sample in samples)),
            nonfinite_losses=round(sums.nonfinite_losses / copies),
            nonfinite_scores=round((sums.nonfinite_tokens - sums.nonfinite_losses) / copies),
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) and not result.skipped else None,
            skip_reason=result.skip_reason,
            nonfinite_gradient_below_stages=sorted({stage for stage, _ in everyones if stage is not None}),
        )

    def text(self, sample: SampleReplay, context: int) -> str:
        """Decode a sample's text around its worst label, which is put in ⟦ ⟧; on one rank.

        Args:
            context: tokens on either side.
        """
        tokens, at = self.plan.data.train[sample.sample].tokens.tolist(), sample.worst_position + 1
        decode = self.plan.models.tokenizer.decode
        before, after = tokens[max(0, at - context) : at], tokens[at + 1 : at + 1 + context]
        return f"{decode(before)}{MASKED_OPEN}{decode(tokens[at : at + 1])}{MASKED_CLOSE}{decode(after)}"


def _quiet(config: RunConfig, scratch: Path) -> RunConfig:
    """The same samples, model and selection, without saving, computing ahead or ranking over data-parallel ranks."""
    scope = config.selection.slm_scope
    return replace(
        config,
        checkpoint=config.checkpoint.without_saving(),
        logging=replace(config.logging, run_dir=str(scratch), timing_log_level=0, probe_file=None),
        parallel=replace(config.parallel, reference_schedule_warmup_steps=0),
        backward=BackwardConfig(),  # all rows: a bad gradient is looked for, not estimated
        selection=replace(
            config.selection,
            slm_probe_interval=0,
            slm_scope="micro-batch" if scope == "data-parallel" else scope,
        ),
    )


def _alone(plan: Plan) -> Plan:
    """The plan with steps of one micro-batch on each data-parallel rank."""
    config, data = plan.config, plan.topology.data
    copies = plan.topology.copies
    user = ds_config.read_json(config.parallel.deepspeed_config)
    return replace(
        plan,
        batch_sizes=BatchSizes.constant(config.training.micro_batch_size * data),
        deepspeed=ds_config.resolve(user, config, data_parallel_size=copies, num_micro_batches=1),
        data=replace(plan.data, valid={}, test={}),
        monitors={},
    )


def _on_host(batch: MicroBatch, loss_N: Tensor, reference_N: Tensor | None, kept_K: Tensor) -> Seen:
    cpu = torch.device("cpu")
    reference_N = None if reference_N is None else reference_N.detach().to(cpu)
    return batch.to(cpu), loss_N.detach().to(cpu), reference_N, kept_K.to(cpu)


def _put_together(parts: list[Seen], length: int) -> Seen:
    """Put the parts of a micro-batch together, of whose sequences several ranks may each have seen some positions."""
    batch = parts[0][0]

    def whole(values: list[Tensor]) -> Tensor:
        whole_bs = values[0].new_zeros(len(batch.sample_b), length)
        for (part, *_), value in zip(parts, values, strict=True):
            whole_bs[:, positions_of(part)] = value.view(part.labels_bs.shape)
        return whole_bs

    valid_bs = whole([part.valid_bs for part, *_ in parts])
    loss_N = whole([part_loss_N for _, part_loss_N, *_ in parts]).flatten()
    references = [reference_N for *_, reference_N, _ in parts if reference_N is not None]
    kept = [torch.zeros_like(part_loss_N).index_fill_(0, kept_K, 1.0) for _, part_loss_N, _, kept_K in parts]
    kept_K = whole(kept).flatten().nonzero().squeeze(1)
    whole_batch = batch._replace(valid_bs=valid_bs)
    return whole_batch, loss_N, whole(references).flatten() if references else None, kept_K


def _samples(
    batch: MicroBatch, loss_N: Tensor, reference_N: Tensor | None, kept_K: Tensor, *, names: list[str]
) -> tuple[SampleReplay, ...]:
    """Summarize the last stage's losses and selection, sample by sample."""
    valid_bs = batch.valid_bs
    loss_bs = loss_N.detach().double().view_as(valid_bs)
    reference_bs = None if reference_N is None else reference_N.double().view_as(valid_bs)
    kept_bs = loss_N.new_zeros(loss_N.shape).index_fill_(0, kept_K, 1.0).view_as(valid_bs)
    found = []
    for row, sample in enumerate(batch.sample_b.tolist()):
        valid_s, loss_s = valid_bs[row], loss_bs[row]
        bad_s = valid_s & ~loss_s.isfinite()
        bad_reference_s = valid_s & False if reference_bs is None else valid_s & ~reference_bs[row].isfinite()
        worst = int(loss_s.masked_fill(~valid_s, -math.inf).argmax())
        wrong = (bad_s | bad_reference_s).nonzero()
        found.append(
            SampleReplay(
                sample=sample,
                source=names[0 if batch.source_b is None else int(batch.source_b[row])],
                loss_all=_mean(loss_s, valid_s),
                worst_loss=None if bad_s.any() or not valid_s.any() else float(loss_s[worst]),
                worst_position=int(wrong[0]) if len(wrong) else worst,
                reference_loss=None if reference_bs is None else _mean(reference_bs[row], valid_s),
                nonfinite_losses=int(bad_s.sum()),
                nonfinite_references=int(bad_reference_s.sum()),
                kept_tokens=int(kept_bs[row].sum()),
                valid_tokens=int(valid_s.sum()),
            )
        )
    return tuple(found)


def _mean(loss_s: Tensor, valid_s: Tensor) -> float | None:
    finite = loss_s[valid_s & loss_s.isfinite()]
    return float(finite.mean()) if len(finite) else None


def worst_samples(micro_batches: list[MicroBatchReplay], count: int) -> list[SampleReplay]:
    """Sort samples by non-finite values, then by loss, and return the worst ones."""

    def badness(sample: SampleReplay) -> tuple[int, float]:
        bad = sample.nonfinite_losses + sample.nonfinite_references
        return bad, math.inf if sample.loss_all is None else sample.loss_all

    samples = [sample for part in micro_batches for sample in part.samples]
    return sorted(samples, key=badness, reverse=True)[:count]


def as_json(record: BadBatch, micro_batches: list[MicroBatchReplay]) -> dict[str, Any]:
    """Convert a replayed step to JSON."""
    return {"step": record.step, "reason": record.reason, "micro_batches": [asdict(part) for part in micro_batches]}
