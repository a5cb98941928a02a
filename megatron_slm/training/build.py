"""The composition root: a plan becomes groups, models, an engine with weights in it, and sources of batches."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import Tensor

from megatron_slm.analysis.probe_records import ProbeFolder
from megatron_slm.checkpoint.fragments import fill_optimizer
from megatron_slm.checkpoint.load import CheckpointSource, read_probe, restore_rng
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.save import Saver, Writer
from megatron_slm.checkpoint.weights import RandomWeights, WeightSource, fill_module
from megatron_slm.config import Architecture, RunConfig
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.load import write_yaml
from megatron_slm.convert.carried import ORIGIN
from megatron_slm.convert.source import Model
from megatron_slm.data.loader import MicroBatchSource, num_global_batches
from megatron_slm.data.packing import Samples
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.device import local_device
from megatron_slm.errors import ConfigError, os_errors_as
from megatron_slm.loss.objective import LossSums, Objective, Observer
from megatron_slm.model.block import compile_blocks
from megatron_slm.parallel.collectives import together
from megatron_slm.parallel.groups import DataParallel, TensorParallel, data_parallel_group, tensor_parallel_group
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.pipeline.costs import arithmetic_costs
from megatron_slm.pipeline.engine import StageContext, pipeline_engine
from megatron_slm.pipeline.module import FlatModule, StageModule, deepspeed_topology
from megatron_slm.pipeline.schedule import Schedule
from megatron_slm.pipeline.search import choose_schedule
from megatron_slm.pipeline.simulate import Sizes, describe
from megatron_slm.pipeline.timers import WORK, Timers
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.training.corpora import boundaries
from megatron_slm.training.evaluation import HeldOutSet
from megatron_slm.training.optimizer import build_optimizer
from megatron_slm.training.origin import write_origin
from megatron_slm.training.plan import Plan
from megatron_slm.training.probe import Probe
from megatron_slm.training.step import FlatTrainer, PipelineTrainer, Trainer
from megatron_slm.training.text_probe import TextProbe

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands; the only part of it that changes from step to step."""

    step: int = 0
    consumed_samples: int = 0
    adam_step: int = 0
    score_threshold: float | None = None
    """The running threshold of --slm-policy quantile; None before there is one."""
    probe_kept: Tensor | None = None
    """What the last probe kept, bool [samples, s]; None before the first."""
    tokens_seen: int | None = 0
    """Valid tokens so far; None if the run goes on from a checkpoint that does not say."""
    tokens_kept: int | None = 0
    """How many of them were trained on."""
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps, that spikes are told by."""

    def count(self, sums: LossSums) -> None:
        """Add the tokens of a step that was applied."""
        if self.tokens_seen is not None and self.tokens_kept is not None:
            self.tokens_seen += round(sums.valid_tokens)
            self.tokens_kept += round(sums.kept_tokens)

    @property
    def skipped_steps(self) -> int:
        """Steps so far that were not applied."""
        return self.step - self.adam_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to step."""

    plan: Plan
    trainer: Trainer
    train_source: Prefetcher
    held_out: list[HeldOutSet]
    probe: Probe | None
    text_probe: TextProbe | None
    saver: Saver
    position: Position


def build_run(plan: Plan, *, observer: Observer | None = None) -> Run:
    """Build everything a run needs on this rank. Collective over the world."""
    saver = _saver(plan)
    torch.manual_seed(plan.config.training.seed + dist.get_rank())
    tp = tensor_parallel_group(plan.topology, sequence_parallel=plan.config.parallel.sequence_parallel)
    divisible = plan.config.model.make_vocab_size_divisible_by
    layers = ParallelLayers(tp, vocabulary_divisible_by=divisible, backends=plan.backends)
    ranks_together = plan.selector.scope == "data-parallel"
    dp = data_parallel_group(plan.topology) if ranks_together else DataParallel()
    objective = Objective(
        selector=plan.selector,
        tp=tp,
        dp=dp,
        head=plan.loss_head,
        observer=observer,
        num_sources=len(plan.train_samples.sources),
    )
    reference = build_reference(plan.reference, plan.topology, layers, plan.dtype)
    if reference is not None and plan.topology.pipeline == 1:
        logger.info("one pipeline stage has no idle slots: the reference rides along")
    make = _pipeline_trainer if plan.zero_stage == 1 else _flat_trainer
    trainer = make(plan, layers, objective, reference, tp)
    position = _fill(plan, trainer.engine.optimizer)
    source = _source(plan, plan.train_samples, pads_at_end=False)
    return Run(
        plan=plan,
        trainer=trainer,
        train_source=_prefetcher(plan, source),
        held_out=_held_out(plan),
        probe=_probe(plan, trainer, source),
        text_probe=_text_probe(plan, trainer),
        saver=saver,
        position=position,
    )


def build_reference(
    model: Model | None, topology: Topology, layers: ParallelLayers, dtype: torch.dtype
) -> FrozenStage | None:
    """This rank's stage of a frozen reference with its weights; None of None. Collective over the world."""
    if model is None:
        return None
    stage = topology.coordinate(dist.get_rank()).pipeline
    with _parameters_in(dtype), local_device():  # at once in its final dtype and place
        reference = FrozenStage(model.architecture, layers, stage=stage, num_stages=topology.pipeline)
    with together():
        fill_module(reference, model.source)
    if layers.backends.compile_blocks:
        compile_blocks(reference)
    return reference


def _pipeline_trainer(
    plan: Plan, layers: ParallelLayers, objective: Objective, reference: FrozenStage | None, tp: TensorParallel
) -> Trainer:
    module = StageModule(plan.architecture, layers, plan.topology)
    if plan.backends.compile_blocks:
        compile_blocks(module)
    optimizer = build_optimizer(module, plan.config.optimizer, plan.backends.optimizer, local_device())
    engine = pipeline_engine(module, optimizer, plan.deepspeed)
    length = plan.config.data.seq_length // (tp.size if tp.sequence_parallel else 1)
    schedule = plan_schedule(plan)
    sizes = _sizes(plan, message_length=length)
    if reference is not None and plan.topology.pipeline > 1:
        logger.info("%s", describe(schedule, "counted", sizes))
    engine.attach(
        StageContext(
            topology=plan.topology,
            objective=objective,
            reference=reference,
            scores=plan.scores,
            schedule=schedule,
            sizes=sizes,
            message_shape=(length, plan.config.training.micro_batch_size, plan.architecture.hidden_size),
            dtype=plan.dtype,
            keeps_documents_apart=boundaries(plan.config, plan.tokenizer).matter_to_layers,
            timers=Timers(plan.config.logging.timing_log_level),
        )
    )
    searches = schedule.mode in ("skewed", "bubble")
    measured = plan.config.parallel.reference_schedule_warmup_steps if searches else 0
    return PipelineTrainer(engine, num_measured_steps=measured)


def _sizes(plan: Plan, *, message_length: int) -> Sizes:
    num_samples, length = plan.config.training.micro_batch_size, plan.config.data.seq_length
    width = plan.reference.architecture.hidden_size if plan.reference else 0
    message = num_samples * message_length * width * plan.dtype.itemsize
    return Sizes.of_micro_batch(num_samples, length, reference_message=message)


def plan_schedule(plan: Plan) -> Schedule:
    """The schedule that a plan starts with."""
    reference = plan.reference.architecture if plan.reference else None
    share = plan.selector.expected_share(plan.config.training.train_iters)
    return counted_schedule(
        plan.config, plan.architecture, reference, plan.topology.pipeline, plan.num_micro_batches, keep_ratio=share
    )


def counted_schedule(
    config: RunConfig,
    arch: Architecture,
    reference: Architecture | None,
    num_stages: int,
    num_micro_batches: int,
    *,
    keep_ratio: float,
) -> Schedule:
    """The schedule for counted costs. With one stage no slot is idle, and the reference rides along."""
    costs = arithmetic_costs(
        arch,
        reference,
        num_stages,
        seq_length=config.data.seq_length,
        keep_ratio=keep_ratio,
        recomputes=config.parallel.recompute_granularity == "full",
    )
    if reference is None:
        return choose_schedule("clm", costs, num_micro_batches)
    mode = config.parallel.reference_schedule if num_stages > 1 else "ride-along"
    return choose_schedule(mode, costs, num_micro_batches)


def _flat_trainer(
    plan: Plan, layers: ParallelLayers, objective: Objective, reference: FrozenStage | None, tp: TensorParallel
) -> Trainer:
    recompute = plan.config.parallel.recompute_granularity == "full"
    # backward passes reduce gradients: they wait for other ranks
    timers = Timers(plan.config.logging.timing_log_level, work=[name for name in WORK if name != "backward-compute"])
    module = FlatModule(plan.architecture, layers, objective, recompute=recompute, timers=timers).to(local_device())
    if plan.backends.compile_blocks:
        compile_blocks(module)
    updates_on = torch.device("cpu") if ds_config.offloads_optimizer(plan.deepspeed) else local_device()
    optimizer = build_optimizer(module, plan.config.optimizer, plan.backends.optimizer, updates_on)
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints the topology
        grid = PipelineParallelGrid(topology=deepspeed_topology(plan.topology))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=plan.deepspeed, mpu=grid)
    return FlatTrainer(engine, plan.topology, reference, plan.num_micro_batches, plan.scores, timers)


def _fill(plan: Plan, optimizer: Any) -> Position:
    """Bring the weights (and on a resume the moments and random states) into the engine."""
    source: WeightSource = RandomWeights(plan.architecture, plan.config.training.seed)
    adam_step: int | None = None
    position = Position()
    if plan.resume is not None:
        manifest = plan.resume.manifest
        source = CheckpointSource(plan.resume.folder)
        position = Position(manifest.step, manifest.consumed_samples, manifest.adam_step, manifest.score_threshold)
        position.tokens_seen, position.tokens_kept = manifest.tokens_seen, manifest.tokens_kept
        position.recent_losses = list(manifest.recent_losses)
        if plan.keeps_order:  # else the first batch is another one
            position.probe_kept = read_probe(plan.resume.folder, manifest)
        adam_step = manifest.adam_step or None  # an imported checkpoint has weights and no moments
        logger.info("resuming after step %d (saved at %s)", manifest.step, manifest.describe_layout())
    elif plan.init is not None:
        source = plan.init.source
    with together():
        fill_optimizer(optimizer, source, adam_step=adam_step)
        if plan.resume is not None:
            restore_rng(plan.resume.folder, plan.resume.manifest, dist.get_rank())
    return position


def _text_probe(plan: Plan, trainer: Trainer) -> TextProbe | None:
    if plan.probe_texts is None:
        return None
    selects = bool(plan.selector.scores)
    if plan.scores is not None and plan.selector.needs_reference:
        logger.info("stored scores do not cover the texts of --probe-file: their losses are recorded, no selection")
        selects = False
    return TextProbe(
        trainer=trainer,
        samples=plan.probe_texts,
        source=_source(plan, plan.probe_texts, pads_at_end=True),
        topology=plan.topology,
        decode=plan.tokenizer.decode,
        folder=ProbeFolder(plan.config.logging.run_dir),
        has_reference=plan.reference is not None,
        selects=selects,
    )


def _source(plan: Plan, samples: Samples, *, pads_at_end: bool) -> MicroBatchSource:
    return MicroBatchSource(
        samples,
        micro_batch_size=plan.config.training.micro_batch_size,
        data_parallel_rank=plan.topology.coordinate(dist.get_rank()).data,
        data_parallel_size=plan.topology.data,
        vocab_size=plan.num_tokens,
        boundaries=boundaries(plan.config, plan.tokenizer),
        pads_at_end=pads_at_end,
    )


def _prefetcher(plan: Plan, source: MicroBatchSource) -> Prefetcher:
    """Reads ahead on the ranks that read at all."""
    return Prefetcher(
        source,
        num_micro_batches=plan.num_micro_batches,
        num_samples=len(plan.train_samples),
        num_threads=plan.config.data.num_workers if _reads(plan, source) else 0,
    )


def _reads(plan: Plan, source: MicroBatchSource) -> bool:
    """Whether this rank's stage needs micro-batches: the first and the last do, the others where documents matter."""
    stage = plan.topology.coordinate(dist.get_rank()).pipeline
    return stage in (0, plan.topology.pipeline - 1) or source.boundaries.matter_to_layers


def _held_out(plan: Plan) -> list[HeldOutSet]:
    sets = []
    for name, samples in (*plan.held_out.items(), *plan.test.items()):
        count = num_global_batches(len(samples), plan.global_batch_size)
        if plan.config.logging.eval_iters is not None:
            count = min(count, plan.config.logging.eval_iters)
        source, at_end = _source(plan, samples, pads_at_end=True), name in plan.test
        reads = _reads(plan, source)
        sets.append(HeldOutSet(name=name, source=source, num_global_batches=count, reads=reads, only_at_end=at_end))
    return sets


def _probe(plan: Plan, trainer: Trainer, source: MicroBatchSource) -> Probe | None:
    interval = plan.config.selection.slm_probe_interval
    if interval == 0 or not plan.selector.scores:
        return None
    return Probe(
        trainer=trainer,
        source=source,
        topology=plan.topology,
        global_batch_size=plan.global_batch_size,
        num_micro_batches=plan.num_micro_batches,
        interval=interval,
    )


def _saver(plan: Plan) -> Saver:
    config = plan.config.checkpoint
    run_dir = Path(plan.config.logging.run_dir)
    tokenizer = None if plan.config.data.tokenizer_type == "NullTokenizer" else run_dir / "tokenizer"
    writer = Writer(
        folder=Path(plan.config.save_folder),
        topology=plan.topology,
        zero_stage=plan.zero_stage,
        architecture=plan.architecture,
        tokenizer_fingerprint=plan.tokenizer.fingerprint(),
        sample_order=plan.train_samples.order_fingerprint,
        extras=tuple(folder for folder in (tokenizer, run_dir / ORIGIN) if folder is not None),
        write_config=lambda path: write_yaml(plan.config, path),
    )
    with together():
        if dist.get_rank() == 0:
            _prepare_run_dir(run_dir)
            if tokenizer is not None:  # now, and not at the first save: it may have no Hugging Face form
                plan.tokenizer.save_pretrained(tokenizer)
            write_origin(plan, run_dir / ORIGIN)
            if config.enabled and plan.resume is not None:
                writer.check(plan.resume.manifest.step, plan.resume.damaged)
            elif config.enabled:
                writer.check(0)
    retention = Retention(
        keep_last=config.keep_last, retain_interval=config.save_retain_interval, keep_best=config.keep_best
    )
    return Saver(writer, asynchronous=config.async_save, retention=retention)


def _prepare_run_dir(run_dir: Path) -> None:
    rule = "is a folder that can be made and written"
    with os_errors_as(ConfigError, "--run-dir", str(run_dir), rule, "choose another"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()


@contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
