"""A scoring pass, checked and laid out before a process group or a weight exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slm.config import RunConfig
from megatron_slm.config.backends import Backends
from megatron_slm.config.scoring import ScoringOptions
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.manifest import Manifest, samples_per_shard
from megatron_slm.run.backends import choose_backends
from megatron_slm.run.checks import check_model_vocabulary
from megatron_slm.run.corpora import open_data
from megatron_slm.run.layout import check_layout
from megatron_slm.run.resume import Resume, num_run_samples
from megatron_slm.run.sample_order import check_order
from megatron_slm.run.stores import scored_data
from megatron_slm.run.tokenizer import open_run_tokenizer


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """All that a scoring pass will be."""

    config: RunConfig
    options: ScoringOptions
    topology: Topology
    tokenizer: Tokenizer
    reference: Model
    num_tokens: int
    """Every token id of the corpus is below this."""
    samples: BlendedSamples
    num_samples: int
    """Samples that the run will draw."""
    backends: Backends

    @property
    def dtype(self) -> torch.dtype:
        """What the reference computes in."""
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def output(self) -> Path:
        """The store's folder."""
        return Path(self.options.output)

    def manifest(self) -> Manifest:
        """A new store's settings. Reads the corpus and the reference's weights for their checksums."""
        training, sequence_length = self.config.training, self.config.data.seq_length
        data = scored_data(self.config, self.tokenizer, self.samples, self.num_samples, with_content=True)
        return Manifest(
            data=data,
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
    """Check a run's configuration for scoring its samples at a layout, which need not be the run's.

    Args:
        rank: rank 0 also compares checksums of checkpoints.
        resume: what `open_resume` found of the run; an order of samples that it has begun is kept, as the run keeps it.
        dry: nothing will be scored (see `open_data`).

    Raises:
        SlmError: with the field, the value, the rule and the fix.
    """
    parallel, training, selection = config.parallel, config.training, config.selection
    topology = Topology.from_world(
        world_size, tensor=parallel.tensor_model_parallel_size, pipeline=parallel.pipeline_model_parallel_size
    )
    if selection.reference_load is None:
        raise ConfigError("--reference-load", None, "is given: the reference to score with", "name its folder")
    if training.global_batch_size is None:
        raise ConfigError(
            "--global-batch-size",
            None,
            "is given (left out, it would follow the layout, and the number of samples with it)",
            "give the run's, as for tools/pretrain_slm.py",
        )
    thorough = rank == 0
    reference = open_model(selection.reference_load, field="--reference-load", checksums=thorough)
    tokenizer = open_run_tokenizer(config)
    check_model_vocabulary(reference, "--reference-load", tokenizer, config)
    check_layout(reference.architecture, config, topology, what="reference")
    check_tensors(reference.architecture, reference.source, field="--reference-load")
    num_tokens = reference.architecture.vocab_size
    num_samples = num_run_samples(config, resume, training.global_batch_size)
    manifest = resume.manifest if resume else None
    data = open_data(config, tokenizer, num_tokens, num_samples, training.global_batch_size, manifest, dry=dry)
    check_order(config, manifest, data.train)
    return ScoringPlan(
        config=config,
        options=options,
        topology=topology,
        tokenizer=tokenizer,
        reference=reference,
        num_tokens=num_tokens,
        samples=data.train,
        num_samples=num_samples,
        backends=choose_backends(
            config.backend, bf16=training.bf16, zero_stage=1, architectures=[reference.architecture]
        ),
    )
