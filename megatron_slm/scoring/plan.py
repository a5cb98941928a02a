"""Validates a scoring pass before any process group or weight is created."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slm.config.backends import Backends
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import ScoringOptions
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.manifest import StoreManifest, samples_per_shard
from megatron_slm.run.backends import choose_backends
from megatron_slm.run.checks import check_model_vocabulary
from megatron_slm.run.corpora import open_run_data
from megatron_slm.run.layout import check_layout, run_topology
from megatron_slm.run.resume import Resume
from megatron_slm.run.stores import scored_data
from megatron_slm.run.tokenizer import open_run_tokenizer


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """A validated scoring pass."""

    config: RunConfig
    options: ScoringOptions
    topology: Topology
    tokenizer: Tokenizer
    reference: Model
    samples: BlendedSamples
    """Training samples of the run."""
    backends: Backends

    @property
    def num_tokens(self) -> int:
        """Exclusive upper bound of the corpora's token ids."""
        return self.reference.architecture.vocab_size

    @property
    def num_samples(self) -> int:
        """Training samples that the run draws."""
        return len(self.samples)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the reference's computations."""
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def output(self) -> Path:
        """Folder of the store."""
        return Path(self.options.output)

    def manifest(self) -> StoreManifest:
        """Build a new store's manifest. Reads the corpora and the reference's weights for their checksums."""
        training, sequence_length = self.config.training, self.config.data.seq_length
        return StoreManifest(
            data=scored_data(self.config, self.tokenizer, self.samples, with_content=True),
            reference=str(self.config.selection.reference_load),
            reference_sha256=self.reference.content_sha256(),
            computed_in=str(self.dtype).removeprefix("torch."),
            dtype=self.options.score_dtype,
            with_entropy=self.options.with_entropy,
            samples_per_shard=samples_per_shard(self.num_samples, sequence_length, training.micro_batch_size),
        )


def make_scoring_plan(
    config: RunConfig,
    options: ScoringOptions,
    world_size: int,
    *,
    rank: int = 0,
    resume: Resume | None = None,
    dry: bool = False,
) -> ScoringPlan:
    """Validate a run's configuration for scoring its samples, at a layout which need not be the run's.

    Args:
        rank: ranks share the checksums of the reference and the token ids of corpora.
        resume: of the run; the sample orders that its checkpoint has begun are continued, as in the run.
        dry: nothing will be scored (see `open_run_data`).

    Raises:
        SlmError: something does not fit.
    """
    training, path = config.training, config.selection.reference_load
    topology = run_topology(config, world_size)
    if path is None:
        raise ConfigError.missing("--reference-load", "scoring", "name the folder of the reference")
    if training.global_batch_size is None:
        raise ConfigError.missing(
            "--global-batch-size",
            "scoring (its default depends on the layout, and the number of samples with it)",
            "pass the run's, as to tools/pretrain_slm.py",
        )
    share = (0, 1) if dry else (rank, world_size)
    reference = open_model(path, field="--reference-load", share=share)
    tokenizer = open_run_tokenizer(config)
    check_model_vocabulary(reference, config, tokenizer, field="--reference-load", path=path)
    check_layout(reference.architecture, config, topology, what="reference")
    check_tensors(reference.architecture, reference.source, field="--reference-load")
    num_tokens = reference.architecture.vocab_size
    data = open_run_data(config, tokenizer, num_tokens, resume, training.global_batch_size, dry=dry, share=share)
    return ScoringPlan(
        config=config,
        options=options,
        topology=topology,
        tokenizer=tokenizer,
        reference=reference,
        samples=data.train,
        backends=choose_backends(
            config.backend, bf16=training.bf16, zero_stage=1, architectures=[reference.architecture]
        ),
    )
