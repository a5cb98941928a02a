"""A run, checked and laid out: everything that can be known before a process group or a weight exists.

Whatever is wrong with flags, layout, files or vocabularies is found here, so that a dry run and a real run
refuse the same things in the same words.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from megatron_slm.config import Architecture, RunConfig
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.backends import Backends
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.convert.source import Model
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.texts import TextSamples, read_texts
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.device import communication_backend, device_name, on_gpu
from megatron_slm.errors import ConfigError
from megatron_slm.loss.kernels import choose_kernels, triton_problem
from megatron_slm.loss.variants import LossHead
from megatron_slm.parallel.batches import batch_arithmetic
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.stored import StoredScores
from megatron_slm.run.backends import choose_backends
from megatron_slm.run.checks import (
    check_best,
    check_entropies,
    check_models,
    check_profile,
    warn_of_unused_flags,
)
from megatron_slm.run.corpora import boundaries, open_data
from megatron_slm.run.resume import Resume, num_run_samples
from megatron_slm.run.sample_order import check_order
from megatron_slm.run.stores import open_scores, scored_data
from megatron_slm.run.tokenizer import open_if_named, open_tokenizer
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.selector import Selector
from megatron_slm.telemetry.monitors import check_monitors
from megatron_slm.telemetry.utilization import Utilization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a run will be."""

    config: RunConfig
    topology: Topology
    architecture: Architecture
    tokenizer: Tokenizer
    init: Model | None
    reference: Model | None
    scores: StoredScores | None
    """The reference's scores where they are read from stores; `reference` is None then."""
    resume: Resume | None
    selector: Selector
    num_tokens: int
    """Every token id of the corpora is below this; the smaller vocabulary of model and reference."""
    train_samples: BlendedSamples
    keeps_order: bool
    """Whether the samples go on from those of the checkpoint, where there is one."""
    held_out: dict[str, SequentialSamples]
    test: dict[str, SequentialSamples]
    """Held-out sets for the end of the run."""
    probe_texts: TextSamples | None
    """The texts of --probe-file."""
    global_batch_size: int
    deepspeed: dict[str, Any]
    backends: Backends
    monitors: dict[str, Any]
    """The DeepSpeed JSON's sections of monitors."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on one data-parallel rank."""
        return self.global_batch_size // (self.config.training.micro_batch_size * self.topology.data)

    @property
    def utilization(self) -> Utilization:
        """How its speed compares with the hardware's."""
        return Utilization.of(
            self.architecture,
            self.reference.architecture if self.reference else None,
            seq_length=self.config.data.seq_length,
            num_devices=self.topology.world_size,
            bf16=self.config.training.bf16,
            peak_tflops=self.config.logging.peak_tflops,
        )

    @property
    def has_reference(self) -> bool:
        """Whether a reference takes part, be it computed or stored."""
        return self.reference is not None or self.scores is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the models compute in."""
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def loss_head(self) -> LossHead:
        """How the loss is computed."""
        return LossHead.from_config(self.config.loss_head)

    def describe_loss_head(self) -> str:
        """What the loss will do with a micro-batch, in a line."""
        training, tensor = self.config.training, self.topology.tensor
        num_tokens = training.micro_batch_size * self.config.data.seq_length
        divisible = self.config.model.make_vocab_size_divisible_by
        num_columns = -(-self.architecture.vocab_size // divisible) * divisible // tensor
        share = self.selector.expected_share(self.config.training.train_iters)
        chosen = self.loss_head.plan(num_tokens, num_columns, share, self.dtype)
        mib = chosen.capacity * num_columns * chosen.dtype.itemsize / 2**20
        text = f"{chosen.variant} ({mib:,.0f} MiB kept of {chosen.capacity} of {num_tokens} tokens)"
        problem = triton_problem() if on_gpu() and self.loss_head.backend == "auto" else None
        return f"{text}, {self.loss_head_kernels} kernels" + (f" (triton: {problem})" if problem else "")

    @property
    def loss_head_kernels(self) -> str:
        """Name of the loss head's kernels in this process."""
        return choose_kernels(self.loss_head.backend, on_gpu=on_gpu()).name

    def describe_backends(self) -> dict[str, str]:
        """What this process computes and communicates with, for people."""
        return {
            "device": device_name(),
            "communication": communication_backend(),
            **self.backends.describe(),
            "loss head": self.describe_loss_head(),
        }

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 1 to 3."""
        return ds_config.zero_stage(self.deepspeed)


def make_plan(
    config: RunConfig, world_size: int, *, rank: int = 0, resume: Resume | None = None, dry: bool = False
) -> Plan:
    """Check a configuration against the world, the files and itself.

    Args:
        rank: rank 0 also compares checksums of checkpoints.
        resume: what `open_resume` found.
        dry: nothing will be trained: leave no index of the samples in the run's folder (see `open_data`).

    Raises:
        SlmError: with the field, the value, the rule and the fix.
    """
    parallel = config.parallel
    topology = Topology.from_world(
        world_size, tensor=parallel.tensor_model_parallel_size, pipeline=parallel.pipeline_model_parallel_size
    )
    user_deepspeed = ds_config.read_json(parallel.deepspeed_config)
    ds_config.check(user_deepspeed, config)
    monitors = ds_config.monitors(user_deepspeed)
    check_monitors(monitors)
    choose_kernels(config.loss_head.loss_head_backend, on_gpu=on_gpu())  # refuses what cannot run here
    global_batch_size, num_micro_batches = batch_arithmetic(config, topology)
    thorough = rank == 0
    init = open_if_named(config.model.init_from, "--init-from", checksums=thorough)
    tokenizer = open_tokenizer(config, init)
    stored = init.architecture if init else resume.manifest.architecture if resume else None
    architecture = resolve_architecture(config, stored, tokenizer.vocab_size)
    stores = config.selection.reference_scores
    reference = (
        None if stores else open_if_named(config.selection.reference_load, "--reference-load", checksums=thorough)
    )
    check_models(config, topology, architecture, tokenizer, init, reference, resume)
    if config.data.eod_mask_loss and tokenizer.eod_id is None:
        raise ConfigError("--eod-mask-loss", True, "needs a tokenizer with an end-of-document token", "leave it out")
    models = [architecture, *([reference.architecture] if reference else [])]
    backends = choose_backends(
        config.backend,
        bf16=config.training.bf16,
        zero_stage=ds_config.zero_stage(user_deepspeed),
        architectures=models,
        updates_on_host=ds_config.offloads_optimizer(user_deepspeed),
        keeps_documents_apart=boundaries(config, tokenizer).matter_to_layers,
    )
    num_tokens = min(model.vocab_size for model in models)
    selector = build_selector(config.selection, seed=config.training.seed, vocabulary_size=num_tokens)
    num_samples = num_run_samples(config, resume, global_batch_size)
    manifest = resume.manifest if resume else None
    data = open_data(config, tokenizer, num_tokens, num_samples, global_batch_size, manifest, dry=dry)
    check_profile(config, topology)
    if backends.compile_blocks and boundaries(config, tokenizer).matter_to_layers:
        raise ConfigError(
            "--compile-blocks",
            True,
            "is off where documents are kept apart (they end elsewhere in every micro-batch: each would be compiled)",
            "leave it out",
        )
    keeps_order = check_order(config, manifest, data.train)
    scored = scored_data(config, tokenizer, data.train, num_samples, with_content=thorough and bool(stores))
    scores = open_scores(config, scored, thorough=thorough) if stores else None
    check_entropies(config, selector, scores)
    check_best(config, data.valid)
    warn_of_unused_flags(config, data.valid, num_samples // global_batch_size)
    probe_texts, probe_file = None, config.logging.probe_file
    if probe_file is not None:
        length = config.data.seq_length
        probe_texts = read_texts(probe_file, tokenizer, sequence_length=length, field="--probe-file")
    return Plan(
        config=config,
        topology=topology,
        architecture=architecture,
        tokenizer=tokenizer,
        init=init,
        reference=reference,
        scores=scores,
        resume=resume,
        selector=selector,
        num_tokens=num_tokens,
        train_samples=data.train,
        keeps_order=keeps_order,
        held_out=data.valid,
        test=data.test,
        probe_texts=probe_texts,
        global_batch_size=global_batch_size,
        deepspeed=ds_config.resolve(
            user_deepspeed, config, data_parallel_size=topology.data, num_micro_batches=num_micro_batches
        ),
        backends=backends,
        monitors=monitors,
    )
