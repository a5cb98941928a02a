"""Validates a run's configuration before any process group or weight is created.

A dry run and a real run make the same plan, so that both raise the same errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_slm.arithmetic import ceil_div
from megatron_slm.backends.choice import run_backends
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.backends import Backends
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.data.texts import TextSamples
from megatron_slm.device import communication_backend, device_name, on_gpu
from megatron_slm.loss.kernels import choose_kernels, triton_problem
from megatron_slm.loss.variants import LossHead
from megatron_slm.parallel.batches import divided_batch_sizes, evaluation_batch_size, samples_together
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.stored import StoredScores
from megatron_slm.run.backward_checks import check_backward_rows
from megatron_slm.run.checks import (
    check_distributions,
    check_documents,
    check_entropies,
    check_environment,
    check_models,
    check_ranks,
    check_reference_update,
    check_selection_columns,
    check_sets,
    resolve_deepspeed,
    warn_of_long_sequences,
    warn_of_unused_flags,
)
from megatron_slm.run.corpora import RunData, open_run_data, read_probe_texts
from megatron_slm.run.folders import check_folders
from megatron_slm.run.layout import run_topology
from megatron_slm.run.models import Models, open_models
from megatron_slm.run.resume import Resume
from megatron_slm.run.stores import open_scores
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.selector import Selector
from megatron_slm.telemetry.utilization import Utilization


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A validated run: its flags resolved, its files opened, no weight read."""

    config: RunConfig
    topology: Topology
    models: Models
    data: RunData
    scores: StoredScores | None
    """The reference's stored scores; `models.reference` is None where there are some."""
    resume: Resume | None
    selector: Selector
    probe_texts: TextSamples | None
    """The texts of --probe-file."""
    batch_sizes: BatchSizes
    eval_batch_size: int
    """Samples of a global batch of an evaluation."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration, with every "auto" resolved."""
    backends: Backends
    monitors: dict[str, Any]
    """Sections of monitors in the DeepSpeed JSON."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the largest step on one data-parallel rank."""
        return self.micro_batches_of(self.batch_sizes.largest)

    def micro_batches_of(self, num_samples: int) -> int:
        """Count the micro-batches of a global batch on one data-parallel rank."""
        return num_samples // samples_together(self.config, self.topology)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 1 to 3."""
        return ds_config.zero_stage(self.deepspeed)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the models' computations."""
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def has_reference(self) -> bool:
        """True with a reference model or stored scores."""
        return self.models.reference is not None or self.scores is not None

    @property
    def loss_head(self) -> LossHead:
        """Settings of the loss head."""
        return LossHead.from_config(self.config.loss_head, self.config.distillation)

    @property
    def utilization(self) -> Utilization:
        """Conversion of tokens per second into shares of the hardware's peak."""
        return Utilization.of(
            self.models.architecture,
            self.models.references,
            seq_length=self.config.data.seq_length,
            num_devices=self.topology.world_size,
            bf16=self.config.training.bf16,
            peak_tflops=self.config.logging.peak_tflops,
        )

    def describe_backends(self) -> dict[str, str]:
        """Name the device and the implementations in use, for people."""
        return {
            "device": device_name(),
            "communication": communication_backend(),
            **self.backends.describe(),
            "loss head": self._describe_loss_head(),
        }

    @property
    def loss_head_kernels(self) -> str:
        """Name of the loss head's kernels in this process."""
        return choose_kernels(self.loss_head.backend, on_gpu=on_gpu()).name

    def _describe_loss_head(self) -> str:
        training, divisible = self.config.training, self.config.model.make_vocab_size_divisible_by
        num_tokens = training.micro_batch_size * self.config.data.seq_length // self.topology.context
        num_columns = ceil_div(self.models.architecture.vocab_size, divisible) * divisible // self.topology.tensor
        chosen = self.loss_head.plan(
            num_tokens, num_columns, self.selector.expected_share(training.train_iters), self.dtype
        )
        mib = chosen.capacity * num_columns * chosen.dtype.itemsize / 2**20
        kernels = self.loss_head_kernels
        problem = triton_problem() if on_gpu() and self.loss_head.backend == "auto" else None
        if problem:
            kernels += f" (triton: {problem})"
        return f"{chosen.variant} ({mib:,.0f} MiB kept of {chosen.capacity} of {num_tokens} tokens), {kernels} kernels"


def make_plan(
    config: RunConfig, world_size: int, *, rank: int = 0, resume: Resume | None = None, dry: bool = False
) -> Plan:
    """Validate a configuration against the world, the files and itself.

    Args:
        rank: ranks share the checksums of checkpoints and the token ids of corpora; rank 0 checks stores and the
            folders that the run writes.
        dry: nothing will be trained (see `open_run_data`).

    Raises:
        SlmError: something does not fit.
    """
    if config.logging.eval_only:
        config = replace(config, checkpoint=config.checkpoint.without_saving())
    topology = run_topology(config, world_size)
    user_deepspeed = ds_config.read_json(config.parallel.deepspeed_config)
    check_environment(config, user_deepspeed)
    check_ranks(config, topology)
    batch_sizes = divided_batch_sizes(config, topology)
    num_micro_batches = batch_sizes.largest // samples_together(config, topology)
    resolved = resolve_deepspeed(user_deepspeed, config, topology, num_micro_batches)
    share = (0, 1) if dry else (rank, world_size)
    models = open_models(config, resume, share=share)
    check_models(config, topology, models, resume)
    backends = run_backends(config, user_deepspeed, models.architectures)
    check_documents(config, models.tokenizer, backends)
    selector = build_selector(config.selection, seed=config.training.seed, vocabulary_size=models.num_tokens)
    check_backward_rows(config, selector, models.architecture)
    data = open_run_data(config, models.tokenizer, models.num_tokens, resume, batch_sizes, dry=dry, share=share)
    check_sets(config, data.valid, data.test)
    warn_of_unused_flags(config, data.valid)
    warn_of_long_sequences(config, models.architecture, models.references)
    if rank == 0:
        check_selection_columns(config, data)
        check_folders(config, models.tokenizer, ds_config.monitors(user_deepspeed), resume)
    scores = open_scores(config, models.tokenizer, data.train, thorough=rank == 0)
    check_entropies(config, selector, scores)
    check_distributions(config, scores, models.architecture.vocab_size)
    check_reference_update(config, models, resume)
    return Plan(
        config=config,
        topology=topology,
        models=models,
        data=data,
        scores=scores,
        resume=resume,
        selector=selector,
        probe_texts=read_probe_texts(config, models.tokenizer),
        batch_sizes=batch_sizes,
        eval_batch_size=evaluation_batch_size(config, topology),
        deepspeed=resolved,
        backends=backends,
        monitors=ds_config.monitors(user_deepspeed),
    )
