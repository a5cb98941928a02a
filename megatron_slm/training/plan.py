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
from megatron_slm.config.backends import Backends, choose_backends
from megatron_slm.config.blends import parse_phases
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.texts import TextSamples, read_texts
from megatron_slm.data.tokenizers import Tokenizer, build_tokenizer, check_same_vocabulary
from megatron_slm.device import communication_backend, device_name, on_gpu
from megatron_slm.errors import CheckpointError, ConfigError, ScoreStoreError, VocabularyError
from megatron_slm.loss.kernels import choose_kernels
from megatron_slm.loss.variants import LossHead
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.batches import batch_arithmetic
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.job import architecture_at
from megatron_slm.reference.stored import StoredScores
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.selector import Selector
from megatron_slm.training.architecture import check_layout
from megatron_slm.training.corpora import boundaries, check_order, open_data
from megatron_slm.training.monitors import check_monitors
from megatron_slm.training.resume import Resume, num_run_samples
from megatron_slm.training.stores import open_scores, scored_data
from megatron_slm.training.utilization import Utilization

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
        kernels = choose_kernels(self.loss_head.backend, on_gpu=on_gpu()).name
        return f"{chosen.variant} ({mib:,.0f} MiB kept of {chosen.capacity} of {num_tokens} tokens), {kernels} kernels"

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
    init = _open(config.model.init_from, "--init-from", checksums=thorough)
    tokenizer = open_tokenizer(config, init)
    stored = init.architecture if init else resume.manifest.architecture if resume else None
    architecture = resolve_architecture(config, stored, tokenizer.vocab_size)
    stores = config.selection.reference_scores
    reference = None if stores else _open(config.selection.reference_load, "--reference-load", checksums=thorough)
    _check_models(config, topology, architecture, tokenizer, init, reference, resume)
    if config.data.eod_mask_loss and tokenizer.eod_id is None:
        raise ConfigError("--eod-mask-loss", True, "needs a tokenizer with an end-of-document token", "leave it out")
    models = [architecture, *([reference.architecture] if reference else [])]
    backends = choose_backends(
        config.backend,
        bf16=config.training.bf16,
        zero_stage=ds_config.zero_stage(user_deepspeed),
        architectures=models,
        updates_on_host=ds_config.offloads_optimizer(user_deepspeed),
    )
    num_tokens = min(model.vocab_size for model in models)
    selector = build_selector(config.selection, seed=config.training.seed, vocabulary_size=num_tokens)
    num_samples = num_run_samples(config, resume, global_batch_size)
    manifest = resume.manifest if resume else None
    data = open_data(config, tokenizer, num_tokens, num_samples, global_batch_size, manifest, dry=dry)
    _check_profile(config, topology)
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
    _check_entropies(config, selector, scores)
    _check_best(config, data.valid)
    _warn_of_what_never_comes(config, data.valid, num_samples // global_batch_size)
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


def _warn_of_what_never_comes(config: RunConfig, held_out: dict[str, SequentialSamples], num_steps: int) -> None:
    if config.logging.eval_interval is not None and not held_out and config.logging.probe_file is None:
        logger.warning("--eval-interval has nothing to evaluate: no set is held out by --split or --valid-data-path")
    for phase in parse_phases(config.data.data_phases):
        if phase.first_step >= num_steps:
            logger.warning("--data-phases: the phase at step %d never begins in %d steps", phase.first_step, num_steps)


def _check_models(
    config: RunConfig,
    topology: Topology,
    arch: Architecture,
    tokenizer: Tokenizer,
    init: Model | None,
    reference: Model | None,
    resume: Resume | None,
) -> None:
    if resume is not None and resume.manifest.architecture != arch:
        raise CheckpointError(
            "--load",
            str(resume.folder),
            "was written by a run of the same architecture",
            "use --init-from alone to start a new run from other weights",
        )
    check_layout(arch, config, topology, what="model")
    check_stages(arch.num_layers, topology.pipeline)
    _check_vocabularies(config, arch, tokenizer, init, reference, resume)
    if reference is not None:
        check_layout(reference.architecture, config, topology, what="reference")
        _check_reference_config(config, reference)
    if init is not None:
        check_tensors(init.architecture, init.source, field="--init-from")
    if reference is not None:
        check_tensors(reference.architecture, reference.source, field="--reference-load")


def _check_profile(config: RunConfig, topology: Topology) -> None:
    ranks, logging_config = config.logging.profile_ranks, config.logging
    if logging_config.profile_step_start is not None and max(ranks) >= topology.world_size:
        raise ConfigError(
            "--profile-ranks", ranks, f"are ranks of the world of {topology.world_size}", "name ranks that there are"
        )


_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


def _check_reference_config(config: RunConfig, reference: Model) -> None:
    path = config.selection.reference_config
    if path is None:
        return
    described = architecture_at(path, "--reference-config")
    for name in _SHAPE:
        planned, loaded = getattr(described, name), getattr(reference.architecture, name)
        if planned != loaded:
            raise ConfigError(
                f"--reference-config: {name}",
                planned,
                f"is that of the reference that is loaded ({loaded})",
                "name the shape of --reference-load, or leave it out",
            )


def _check_entropies(config: RunConfig, selector: Selector, scores: StoredScores | None) -> None:
    if scores is not None and selector.needs("reference-entropy") and not scores.has_entropy:
        raise ScoreStoreError(
            "--reference-scores",
            config.selection.reference_scores,
            "hold entropies (--slm-score reference-entropy needs them)",
            "write them with tools/score_corpus.py --with-entropy, or choose another score",
        )


def _check_best(config: RunConfig, held_out: dict[str, SequentialSamples]) -> None:
    best = config.checkpoint.keep_best
    if best is not None and best not in held_out:
        known = ", ".join(held_out) or "there is none"
        raise ConfigError(
            "--keep-best", best, f"is the name of a held-out set ({known})", "name one, or add --valid-data-path"
        )


def _open(path: str | None, field: str, *, checksums: bool) -> Model | None:
    return None if path is None else open_model(path, field=field, checksums=checksums)


def open_run_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer, for those who need nothing else of its models.

    Raises:
        ConfigError: see `open_tokenizer`.
    """
    return open_tokenizer(config, _open(config.model.init_from, "--init-from", checksums=False))


def open_tokenizer(config: RunConfig, init: Model | None) -> Tokenizer:
    """The run's tokenizer: the one named, else the one in --init-from.

    Raises:
        ConfigError: there is neither, or it cannot be read.
    """
    data = config.data
    model = data.tokenizer_model
    if model is None and init is not None and init.tokenizer_folder is not None:
        model = str(init.tokenizer_folder)
    if model is None and data.tokenizer_type != "NullTokenizer":
        raise ConfigError(
            "--tokenizer-model",
            None,
            "is given (the tokenizer the corpus was made with)",
            "name a tokenizer folder or file; NullTokenizer with --vocab-size needs none",
        )
    tokenizer = build_tokenizer(data.tokenizer_type, model, data.vocab_size)
    if data.vocab_size not in (None, tokenizer.vocab_size) and data.tokenizer_type != "NullTokenizer":
        raise ConfigError(
            "--vocab-size", data.vocab_size, f"is the tokenizer's {tokenizer.vocab_size}", "correct it or leave it out"
        )
    return tokenizer


def _check_vocabularies(
    config: RunConfig,
    arch: Architecture,
    tokenizer: Tokenizer,
    init: Model | None,
    reference: Model | None,
    resume: Resume | None,
) -> None:
    if tokenizer.vocab_size > arch.vocab_size:
        raise VocabularyError(
            "vocabulary of the model",
            arch.vocab_size,
            f"holds the tokenizer's {tokenizer.vocab_size} tokens",
            "use the tokenizer that belongs to the model",
        )
    for model, field in ((init, "--init-from"), (reference, "--reference-load")):
        if model is not None:
            check_model_vocabulary(model, field, tokenizer, config)
    fingerprint = resume.manifest.tokenizer_fingerprint if resume else None
    if fingerprint is not None and fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            "--load: tokenizer",
            fingerprint[:12],
            "is the run's tokenizer, by token table",
            "use the tokenizer of the run that is resumed",
        )


def check_model_vocabulary(model: Model, field: str, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Make sure that a model's token ids mean what the run's tokenizer says.

    Raises:
        VocabularyError: it has too few tokens, another token table, or no tokenizer to compare.
    """
    if model.architecture.vocab_size < tokenizer.vocab_size:
        raise VocabularyError(
            f"{field}: vocabulary size",
            model.architecture.vocab_size,
            f"is at least the tokenizer's {tokenizer.vocab_size}",
            "use a model of the same vocabulary",
        )
    if config.data.tokenizer_type == "NullTokenizer":
        return  # ids without a table: sizes are all there is to compare
    if model.tokenizer_folder is None:
        raise VocabularyError(
            f"{field}: tokenizer",
            str(config.selection.reference_load if "ref" in field else config.model.init_from),
            "comes with the tokenizer it was trained with, so that the vocabularies can be compared token by token",
            "copy its tokenizer files into the folder",
        )
    theirs = build_tokenizer("HuggingFaceTokenizer", str(model.tokenizer_folder))
    check_same_vocabulary(tokenizer, theirs, "--tokenizer-model", field)
