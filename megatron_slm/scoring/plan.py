"""Validates a scoring pass before any process group or weight is created."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slm.backends.choice import choose_backends
from megatron_slm.config.backends import Backends
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import ScoringOptions
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.tokenizers.registry import NullTokenizer, Tokenizer, build_tokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.manifest import StoredDistribution, StoreManifest, samples_per_shard
from megatron_slm.run.checks import check_model_vocabulary
from megatron_slm.run.corpora import open_run_data
from megatron_slm.run.layout import check_layout, run_topology
from megatron_slm.run.opened_corpora import eod_id
from megatron_slm.run.resume import Resume
from megatron_slm.run.stores import scored_data
from megatron_slm.run.tokenizer import open_run_tokenizer
from megatron_slm.scoring.retokenized import RetokenizedSamples


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
    retokenized: RetokenizedSamples | None = None
    """The same samples in the tokens of the reference's own tokenizer; None where it is the run's."""
    reference_tokenizer: Tokenizer | None = None
    """That tokenizer."""

    @property
    def num_tokens(self) -> int:
        """Exclusive upper bound of the corpora's token ids."""
        return self.reference.architecture.vocab_size

    @property
    def reference_length(self) -> int:
        """Inputs of a sample as the reference reads it."""
        return self.config.data.seq_length if self.retokenized is None else self.retokenized.sequence_length

    @property
    def reference_id(self) -> str:
        """Checksum of the reference, and of its tokenizer and length where they are not the run's."""
        content = self.reference.content_sha256()
        if self.reference_tokenizer is None:
            return content
        same = self.reference_tokenizer.fingerprint() == self.tokenizer.fingerprint()
        if same and self.reference_length == self.config.data.seq_length:
            return content
        identity = f"{content} {self.reference_tokenizer.fingerprint()} {self.reference_length}"
        return hashlib.sha256(identity.encode()).hexdigest()

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

    @property
    def distribution(self) -> StoredDistribution | None:
        """The stored part of each token's distribution; None for losses (and entropies) alone."""
        options = self.options
        count = options.top_logprobs or options.sampled_ids
        if count is None:
            return None
        return StoredDistribution(
            kind="top" if options.top_logprobs else "sample",
            count=count,
            dtype=options.logprobs_dtype,
            vocabulary_size=self.reference.architecture.vocab_size,
        )

    def manifest(self) -> StoreManifest:
        """Build a new store's manifest. Reads the corpora and the reference's weights for their checksums."""
        training, sequence_length = self.config.training, self.config.data.seq_length
        return StoreManifest(
            data=scored_data(self.config, self.tokenizer, self.samples, with_content=True),
            reference=str(self.config.reference_path),
            reference_sha256=self.reference_id,
            computed_in=str(self.dtype).removeprefix("torch."),
            dtype=self.options.score_dtype,
            with_entropy=self.options.with_entropy,
            samples_per_shard=samples_per_shard(
                self.num_samples, sequence_length, training.micro_batch_size, distribution=self.distribution
            ),
            distribution=self.distribution,
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
    path = config.reference_path
    topology = run_topology(config, world_size)
    if path is None:
        raise ConfigError.missing("--reference-load", "scoring", "name the folder of the reference")
    if config.reference_base_path is not None:
        rule = "not be used in scoring, which stores the losses of one reference"
        fix = "score both models, one after the other, for --reference-scores-combine difference"
        raise ConfigError("--reference-base", config.selection.reference_base, rule, fix)
    if not config.names_batch_size:
        raise ConfigError.missing(
            "--global-batch-size",
            "scoring (its default depends on the layout, and the number of samples with it)",
            "pass the run's, as to tools/pretrain_slm.py",
        )
    if options.retokenize and config.fill_in_middle.fim_data:
        rule = "not be used with --retokenize, which tokenizes documents as they are in the corpus"
        raise ConfigError("--fim-data", True, rule, "score with a reference of the run's tokenizer, or remove it")
    share = (0, 1) if dry else (rank, world_size)
    reference = open_model(path, field="--reference-load", share=share)
    tokenizer = open_run_tokenizer(config)
    reference_tokenizer = _reference_tokenizer(reference, config, path) if options.retokenize else None
    if reference_tokenizer is None:
        check_model_vocabulary(reference, config, tokenizer, field="--reference-load", path=path)
    check_layout(reference.architecture, config, topology, what="reference")
    check_tensors(reference.architecture, reference.source, field="--reference-load")
    if options.top_logprobs is not None and options.top_logprobs > tokenizer.vocab_size:
        rule = f"be at most the tokenizer's {tokenizer.vocab_size} ids"
        raise ConfigError("--top-logprobs", options.top_logprobs, rule, "use e.g. 64")
    num_tokens = reference.architecture.vocab_size if reference_tokenizer is None else tokenizer.vocab_size
    data = open_run_data(config, tokenizer, num_tokens, resume, config.batch_sizes(default=1), dry=dry, share=share)
    retokenized = None
    if reference_tokenizer is not None:
        retokenized = RetokenizedSamples(
            data.train,
            tokenizer=tokenizer,
            reference=reference_tokenizer,
            special=_special_tokens(config, tokenizer, reference_tokenizer),
            sequence_length=options.reference_seq_length or config.data.seq_length,
        )
        _check_length(retokenized.sequence_length, config, topology)
    return ScoringPlan(
        config=config,
        options=options,
        topology=topology,
        tokenizer=tokenizer,
        reference=reference,
        samples=data.train,
        retokenized=retokenized,
        reference_tokenizer=reference_tokenizer,
        backends=choose_backends(
            config.backend,
            bf16=config.training.bf16,
            zero_stage=1,
            architectures=[reference.architecture],
            keeps_documents_apart=config.data.reset_attention_mask,
            resets_positions=config.data.reset_position_ids,
            cuts_sequences=topology.context > 1,
        ),
    )


def _reference_tokenizer(reference: Model, config: RunConfig, path: str) -> Tokenizer:
    """Open the tokenizer in the reference's folder; NullTokenizer where the run has that one."""
    size = reference.architecture.vocab_size
    if config.data.tokenizer_type == "NullTokenizer":
        return NullTokenizer(config.data.vocab_size)
    if reference.tokenizer_folder is None:
        fix = "copy its tokenizer files into the folder"
        raise VocabularyError.missing(f"tokenizer of --reference-load {path}", "--retokenize", fix)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(reference.tokenizer_folder))
    tokenizer.special_tokens_are_plain = True
    if tokenizer.vocab_size > size:
        rule = f"be at least its tokenizer's {tokenizer.vocab_size}"
        raise VocabularyError("--reference-load: vocabulary size", size, rule, "use the tokenizer of this reference")
    return tokenizer


def _special_tokens(config: RunConfig, tokenizer: Tokenizer, reference: Tokenizer) -> dict[int, int]:
    """Map the run's end-of-document token and BOS to the reference's."""
    tokenizer.special_tokens_are_plain = True
    eod, pairs = eod_id(config, tokenizer), {}
    if tokenizer.bos_id is not None:
        pairs[tokenizer.bos_id] = reference.eod_id if reference.bos_id is None else reference.bos_id
    if eod is not None:
        pairs[eod] = reference.eod_id
    if any(index is None for index in pairs.values()):
        raise VocabularyError(
            "--reference-load: end-of-document token",
            "none",
            "exist, for --retokenize: the run's tokenizer has one",
            "set eos_token in the tokenizer_config.json of the reference",
        )
    return {own: theirs for own, theirs in pairs.items() if theirs is not None}


def _check_length(length: int, config: RunConfig, topology: Topology) -> None:
    """Check that sequence and context parallelism can cut the reference's samples."""
    if topology.context > 1 and length % (2 * topology.context):
        rule = f"be a multiple of 2 x --context-parallel-size, {2 * topology.context}"
        raise ConfigError("--reference-seq-length", length, rule, "round it up")
    if config.parallel.sequence_parallel and length // topology.context % topology.tensor:
        times = f" x --context-parallel-size ({topology.context})" if topology.context > 1 else ""
        rule = f"be a multiple of --tensor-model-parallel-size, {topology.tensor}{times}, with --sequence-parallel"
        raise ConfigError("--reference-seq-length", length, rule, "round it up")
