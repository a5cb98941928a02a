"""The composition root: builds groups, models, an engine with loaded weights, and sources of batches from a plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules

from megatron_slm.analysis.probe_records import ProbeFolder
from megatron_slm.checkpoint.fragments import fill_optimizer, share_weights
from megatron_slm.checkpoint.load import CheckpointSource, load_state, restore_rng
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.save import Saver, Writer
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.weights import RandomWeights, WeightSource
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.convert.companion_files import ORIGIN
from megatron_slm.data.loader import MicroBatchSource, num_global_batches
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.device import local_device
from megatron_slm.engine.context import StageContext
from megatron_slm.engine.flat import FlatModule, FlatTrainer
from megatron_slm.engine.grid import Grid
from megatron_slm.engine.module import StageModule
from megatron_slm.engine.partition import Partition
from megatron_slm.engine.pipeline import pipeline_engine
from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.schedule.simulate import describe
from megatron_slm.engine.timers import WORK, Timers
from megatron_slm.engine.trainer import Trainer
from megatron_slm.errors import ConfigError, os_errors_as
from megatron_slm.flags.load import write_yaml
from megatron_slm.loss.distillation import Distillation
from megatron_slm.loss.objective import Objective, Observer
from megatron_slm.model.block import Block, compile_blocks
from megatron_slm.parallel.groups import (
    DataParallel,
    TensorParallel,
    create_context_parallel_group,
    create_data_parallel_group,
    create_tensor_parallel_group,
)
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.parallel.shards import parameters_in
from megatron_slm.reference.following import FILE_KIND, FollowingReference
from megatron_slm.reference.frozen import FirstTokens, FrozenStage, build_reference
from megatron_slm.reference.pair import ReferencePair
from megatron_slm.run.corpora import boundaries
from megatron_slm.run.origin import write_origin
from megatron_slm.run.plan import Plan
from megatron_slm.run.schedule import message_sizes, plan_schedule
from megatron_slm.telemetry.history import KEEP_ALL
from megatron_slm.training.fixed_batch import FixedBatch
from megatron_slm.training.optimizer import build_optimizer
from megatron_slm.training.selection_probe import SelectionProbe
from megatron_slm.training.sources import HeldOutSet, held_out_sets, micro_batch_source, train_prefetcher
from megatron_slm.training.text_probe import TextProbe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, ready for its next step."""

    plan: Plan
    trainer: Trainer
    train_source: Prefetcher
    held_out: list[HeldOutSet]
    selection_probe: SelectionProbe | None
    text_probe: TextProbe | None
    saver: Saver
    state: RunState
    following: FollowingReference | None = None
    """Updates the reference; None where it is frozen."""

    @property
    def resume_step(self) -> int:
        """Last step whose earlier records are kept; 0 for a new run, whose records are its own."""
        return KEEP_ALL if self.plan.config.logging.eval_only else self.state.step


def build_run(plan: Plan, *, observer: Observer | None = None) -> Run:
    """Build this rank's part of a run. Collective over the world."""
    saver = _saver(plan)
    torch.manual_seed(plan.config.training.seed + dist.get_rank())
    tp = create_tensor_parallel_group(
        plan.topology,
        sequence_parallel=plan.config.parallel.sequence_parallel,
        num_query_groups=[arch.num_query_groups for arch in plan.models.architectures],
    )
    divisible = plan.config.model.make_vocab_size_divisible_by
    context = create_context_parallel_group(plan.topology)
    layers = ParallelLayers(tp, context=context, vocabulary_divisible_by=divisible, backends=plan.backends)
    dp = create_data_parallel_group(plan.topology)
    grid = Grid(plan.topology, tp, dp)
    objective = Objective(
        selector=plan.selector,
        tp=tp,
        dp=dp if plan.selector.scope == "data-parallel" else DataParallel(),
        context=context,
        head=plan.loss_head,
        distillation=Distillation.from_config(plan.config.distillation),
        observer=observer,
        num_sources=len(plan.data.train.sources),
    )
    reference = _reference(plan, layers, dp)
    if reference is not None and plan.topology.pipeline == 1:
        logger.info("one pipeline stage has no idle slots: the reference rides along")
    make = _pipeline_trainer if plan.zero_stage == 1 else _flat_trainer
    trainer = make(plan, layers, grid, objective, reference)
    state = _load(plan, trainer.engine.optimizer)
    if trainer.rows is not None:
        state.row_shares = trainer.rows.first_shares(state.row_shares)
    source = micro_batch_source(plan, plan.data.train, pads_at_end=False)
    return Run(
        plan=plan,
        trainer=trainer,
        train_source=train_prefetcher(plan, source),
        held_out=held_out_sets(plan),
        selection_probe=_selection_probe(plan, trainer, source),
        text_probe=_text_probe(plan, trainer),
        saver=saver,
        state=state,
        following=None if reference is None else _following(plan, reference),
    )


def _reference(plan: Plan, layers: ParallelLayers, dp: DataParallel) -> FrozenStage | ReferencePair | None:
    """Build this rank's stage of the reference, or of two; None where none runs."""
    shares = plan.config.shares_reference(zero_stage=plan.zero_stage, copies=dp.size)
    build = partial(
        build_reference, topology=plan.topology, layers=layers, dtype=plan.dtype, shared_by=dp if shares else None
    )
    frozen = plan.models.reference
    if frozen is None:
        return None
    arch = frozen.architecture
    source: WeightSource = frozen.source
    if plan.config.distillation.distills:  # both models' distributions are over the same rows, cut alike
        source = FirstTokens(source, arch.vocab_size)
        arch = replace(arch, vocab_size=plan.models.architecture.vocab_size)
    reference = build(arch, source)
    base = plan.models.reference_base
    if base is None:
        return reference
    return ReferencePair(reference, build(base.architecture, base.source))


def _following(plan: Plan, reference: FrozenStage | ReferencePair) -> FollowingReference | None:
    """Build what updates the reference, continued from a checkpoint on a resume; None where it is frozen."""
    frozen = plan.models.reference
    if frozen is None or not plan.config.reference_update.updates:
        return None
    assert isinstance(reference, FrozenStage), "of two references none is updated"
    source: WeightSource = frozen.source
    if plan.resume is not None:
        source = CheckpointSource(plan.resume.folder, plan.resume.manifest, kind=FILE_KIND)
    place = plan.topology.coordinate(dist.get_rank())
    with raise_on_all_ranks():
        return FollowingReference(reference, source, decay=plan.config.reference_update.decay, place=place)


def _pipeline_trainer(
    plan: Plan, layers: ParallelLayers, grid: Grid, objective: Objective, reference: FrozenStage | ReferencePair | None
) -> Trainer:
    parallel = plan.config.parallel
    rule, offloads = parallel.recomputation, parallel.offload_activations
    with parameters_in(plan.dtype), local_device():
        module = StageModule(plan.models.architecture, layers, grid, rule, offloads=offloads)
    if plan.backends.compile_blocks:
        compile_blocks(module)
    optimizer = build_optimizer(module, plan.config.optimizer, plan.backends.optimizer, local_device())
    tp = objective.tp
    length = plan.config.data.seq_length // plan.topology.context // (tp.size if tp.sequence_parallel else 1)
    schedule = plan_schedule(plan)
    sizes = message_sizes(plan, message_length=length)
    if reference is not None and plan.topology.pipeline > 1:
        logger.info("%s", describe(schedule, "counted", sizes))
    context = StageContext(
        topology=plan.topology,
        objective=objective,
        reference=reference,
        scores=plan.scores,
        schedule=schedule,
        num_measured_steps=parallel.reference_schedule_warmup_steps if schedule.mode.works_ahead else 0,
        sizes=sizes,
        message_shape=(length, plan.config.training.micro_batch_size, plan.models.architecture.hidden_size),
        dtype=plan.dtype,
        keeps_documents_apart=boundaries(plan.config, plan.models.tokenizer).matter_to_layers,
        timers=Timers(plan.config.logging.timing_log_level),
        rows=_row_sampler(plan, tp),
    )
    return pipeline_engine(module, optimizer, plan.deepspeed, context)


def _flat_trainer(
    plan: Plan, layers: ParallelLayers, grid: Grid, objective: Objective, reference: FrozenStage | ReferencePair | None
) -> Trainer:
    recomputation = plan.config.parallel.recomputation
    # backward passes reduce gradients: they wait for other ranks
    timers = Timers(plan.config.logging.timing_log_level, work=[name for name in WORK if name != "backward-compute"])
    offloads = plan.config.parallel.offload_activations
    with parameters_in(plan.dtype, without_values=plan.zero_stage == 3), local_device():
        module = FlatModule(plan.models.architecture, layers, recomputation=recomputation, offloads=offloads)
    if plan.backends.compile_blocks:
        compile_blocks(module)
    updates_on = torch.device("cpu") if ds_config.offloads_optimizer(plan.deepspeed) else local_device()
    optimizer = build_optimizer(module, plan.config.optimizer, plan.backends.optimizer, updates_on)
    written_out = not plan.config.backward.is_exact or recomputation.granularity == "selective"
    if plan.zero_stage == 3 and written_out:
        set_z3_leaf_modules(module, [Block])  # its backward pass is one function, which needs all of its weights
    if plan.zero_stage == 3:
        Partition(module, grid, plan.deepspeed, plan.dtype)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=plan.deepspeed, mpu=grid)
    return FlatTrainer(
        engine,
        plan.topology,
        objective,
        reference=reference,
        scores=plan.scores,
        num_micro_batches=plan.micro_batches_of(plan.batch_sizes.at(0)),
        timers=timers,
        rows=_row_sampler(plan, objective.tp),
    )


def _row_sampler(plan: Plan, tp: TensorParallel) -> RowSampler | None:
    config = plan.config
    if config.backward.is_exact:
        return None
    return RowSampler(
        config=config.backward,
        selector=plan.selector,
        seed=config.training.seed,
        num_blocks=plan.models.architecture.num_layers,
        num_samples=config.training.micro_batch_size,
        length=config.data.seq_length,
        data_rank=plan.topology.coordinate(dist.get_rank()).data,
        data_size=plan.topology.data,
        cuts_sequences=plan.topology.context > 1,
        counts_here=tp.rank == 0 or tp.sequence_parallel,
    )


def _load(plan: Plan, optimizer: Any) -> RunState:
    """Load the weights, and on a resume the moments, random states and run state. Collective over the world."""
    source: WeightSource = RandomWeights(plan.models.architecture, plan.config.training.seed)
    adam_step: int | None = None
    state = RunState()
    if plan.resume is not None:
        manifest = plan.resume.manifest
        source = CheckpointSource(plan.resume.folder, manifest)
        state = load_state(plan.resume.folder, manifest)
        if not plan.data.keeps_order:
            state.probe_kept = None  # it is of another first batch
        adam_step = state.adam_step or None  # an imported checkpoint has weights and no moments
        logger.info("resuming after step %d (saved at %s)", state.step, manifest.describe_layout())
    elif plan.models.init is not None:
        source = plan.models.init.source
    with raise_on_all_ranks():
        fill_optimizer(optimizer, source, adam_step=adam_step)
        if plan.resume is not None:
            restore_rng(plan.resume.folder, plan.resume.manifest, dist.get_rank())
    share_weights(optimizer)
    return state


def _text_probe(plan: Plan, trainer: Trainer) -> TextProbe | None:
    if plan.probe_texts is None:
        return None
    selects = bool(plan.selector.scores)
    if plan.config.selection.columns:
        logger.info("columns do not cover the texts of --probe-file: recording their losses without a selection")
        selects = False
    if plan.scores is not None and plan.selector.needs_reference:
        logger.info("stored scores do not cover the texts of --probe-file: recording their losses without a selection")
        selects = False
    source = micro_batch_source(plan, plan.probe_texts, pads_at_end=True)
    return TextProbe(
        samples=plan.probe_texts,
        batch=FixedBatch(
            trainer=trainer,
            source=source,
            topology=plan.topology,
            num_micro_batches=num_global_batches(len(plan.probe_texts), source.samples_together),
        ),
        decode=plan.models.tokenizer.decode,
        folder=ProbeFolder(plan.config.logging.run_dir),
        has_reference=plan.models.reference is not None,
        selects=selects,
    )


def _selection_probe(plan: Plan, trainer: Trainer, source: MicroBatchSource) -> SelectionProbe | None:
    interval = plan.config.selection.slm_probe_interval
    if interval == 0 or not plan.selector.scores:
        return None
    batch = FixedBatch(
        trainer=trainer,
        source=source,
        topology=plan.topology,
        num_micro_batches=plan.micro_batches_of(plan.batch_sizes.at(0)),
        reference_changes=plan.config.reference_update.updates,
    )
    return SelectionProbe(batch=batch, interval=interval)


def _saver(plan: Plan) -> Saver:
    config = plan.config.checkpoint
    run_dir = Path(plan.config.logging.run_dir)
    tokenizer = None if plan.config.data.tokenizer_type == "NullTokenizer" else run_dir / "tokenizer"
    writer = Writer(
        folder=Path(plan.config.save_folder),
        topology=plan.topology,
        zero_stage=plan.zero_stage,
        architecture=plan.models.architecture,
        tokenizer_fingerprint=plan.models.tokenizer.fingerprint(),
        sample_order=plan.data.train.order_fingerprint,
        extras=tuple(folder for folder in (tokenizer, run_dir / ORIGIN) if folder is not None),
        write_config=lambda path: write_yaml(plan.config, path),
        describe_data=plan.data.train.state,
    )
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            _prepare_run_dir(run_dir)
            if not plan.config.logging.eval_only:
                if tokenizer is not None:
                    plan.models.tokenizer.save_pretrained(tokenizer)
                write_origin(plan, run_dir / ORIGIN)
            if config.enabled and plan.resume is not None:
                writer.prepare(plan.resume.manifest.step, plan.resume.damaged)
            elif config.enabled:
                writer.prepare(0)
    retention = Retention(
        keep_last=config.keep_last, retain_interval=config.save_retain_interval, keep_best=config.keep_best
    )
    return Saver(writer, asynchronous=config.async_save, retention=retention)


def _prepare_run_dir(run_dir: Path) -> None:
    rule = "be a writable folder"
    with os_errors_as(ConfigError, "--run-dir", str(run_dir), rule, "choose another"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
