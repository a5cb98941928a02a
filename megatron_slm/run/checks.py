"""Validates a run's configuration across sections and against its files."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Backends
from megatron_slm.config.blends import parse_phases
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scores import EXTERNAL
from megatron_slm.convert.source import Model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.corpus.columns import check_columns, read_column_sidecar
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.tokenizers.registry import Tokenizer, build_tokenizer, check_same_vocabulary
from megatron_slm.device import on_gpu
from megatron_slm.errors import CheckpointError, ConfigError, CorpusError, ScoreStoreError, VocabularyError
from megatron_slm.loss.kernels import choose_kernels
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.planned_run import architecture_at
from megatron_slm.reference.following import FILE_KIND
from megatron_slm.reference.stored import StoredScores
from megatron_slm.run.corpora import RunData, boundaries
from megatron_slm.run.layout import check_layout
from megatron_slm.run.models import Models
from megatron_slm.run.opened_corpora import eod_id
from megatron_slm.run.resume import Resume
from megatron_slm.selection.selector import Selector
from megatron_slm.telemetry.monitors import accepted_by_deepspeed, check_monitors

logger = logging.getLogger(__name__)


def check_environment(config: RunConfig, user_deepspeed: dict[str, Any]) -> None:
    """Validate the DeepSpeed JSON, and check that its monitors and the loss head's kernels are installed.

    Raises:
        ConfigError: a field contradicts a flag, or a package is missing.
    """
    ds_config.check(user_deepspeed, config)
    check_monitors(ds_config.monitors(user_deepspeed))
    choose_kernels(config.loss_head.loss_head_backend, on_gpu=on_gpu())


def check_models(config: RunConfig, topology: Topology, models: Models, resume: Resume | None) -> None:
    """Validate model, reference and checkpoint against the layout, the vocabulary and each other.

    Raises:
        SlmError: they do not match.
    """
    arch, init, reference = models.architecture, models.init, models.reference
    if resume is not None and resume.manifest.architecture != arch:
        raise CheckpointError(
            "--load",
            str(resume.folder),
            "have been saved by a run of the same architecture",
            "use --init-from alone to start a new run from other weights",
        )
    check_layout(arch, config, topology, what="model")
    if reference is not None and config.distillation.distills:
        _check_distilled_vocabulary(config, arch.vocab_size, reference.architecture.vocab_size)
    check_stages(arch.num_layers, topology.pipeline)
    _check_vocabularies(config, models, resume)
    if reference is not None:
        check_layout(reference.architecture, config, topology, what="reference")
        _check_reference_config(config, reference)
    if (base := models.reference_base) is not None:
        check_layout(base.architecture, config, topology, what="reference base")
        check_tensors(base.architecture, base.source, field="--reference-base")
    if init is not None:
        check_tensors(init.architecture, init.source, field="--init-from")
    if reference is not None:
        check_tensors(reference.architecture, reference.source, field="--reference-load")


def check_documents(config: RunConfig, tokenizer: Tokenizer, backends: Backends) -> None:
    """Validate the flags on document boundaries against the tokenizer and the backends.

    Raises:
        ConfigError: the tokenizer has no end-of-document token, or compiled blocks would see documents.
    """
    if config.data.eod_mask_loss and eod_id(config, tokenizer) is None:
        raise ConfigError(
            "--eod-mask-loss",
            True,
            "have a tokenizer with an end-of-document token",
            "leave it out, name one with --eod-token, or use another",
        )
    if backends.compile_blocks and boundaries(config, tokenizer).matter_to_layers:
        raise ConfigError(
            "--compile-blocks",
            True,
            "be off with --reset-attention-mask or --reset-position-ids (documents end elsewhere in every "
            "micro-batch, so each would be compiled)",
            "leave it out",
        )


def resolve_deepspeed(
    user_deepspeed: dict[str, Any], config: RunConfig, topology: Topology, num_micro_batches: int
) -> dict[str, Any]:
    """Complete the DeepSpeed JSON of a run (see `config.deepspeed.resolve`).

    Raises:
        ConfigError: it contradicts a flag, or DeepSpeed rejects a field of its ZeRO section.
    """
    from deepspeed.runtime.zero.config import get_zero_config

    resolved = ds_config.resolve(
        user_deepspeed, config, data_parallel_size=topology.copies, num_micro_batches=num_micro_batches
    )
    with accepted_by_deepspeed("ZeRO", "zero_optimization."):
        get_zero_config(resolved)
    return resolved


def check_ranks(config: RunConfig, topology: Topology) -> None:
    """Check that the profiled ranks exist.

    Raises:
        ConfigError: one does not.
    """
    ranks = config.logging.profile_ranks
    if config.logging.profile_step_start is not None and max(ranks) >= topology.world_size:
        rule = f"be ranks of the world, 0 to {topology.world_size - 1}"
        raise ConfigError("--profile-ranks", ranks, rule, "correct them")


def check_sets(config: RunConfig, valid: Collection[str], test: Collection[str]) -> None:
    """Check that the held-out set of --keep-best exists, and some set with --eval-only.

    Args:
        valid, test: names of the held-out sets.

    Raises:
        ConfigError: it does not.
    """
    if config.logging.eval_only and not valid and not test and config.logging.probe_file is None:
        fix = "name held-out corpora, with --split or --test-data-path too, or texts with --probe-file"
        raise ConfigError.missing("--valid-data-path", "--eval-only", fix)
    best = config.checkpoint.keep_best
    if best is not None and best not in valid:
        known = ", ".join(valid) or "there is none"
        rule = f"be the name of a held-out set ({known})"
        raise ConfigError("--keep-best", best, rule, "name one, or add --valid-data-path")


def check_reference_update(config: RunConfig, models: Models, resume: Resume | None) -> None:
    """Validate --reference-update against the models and the checkpoint.

    Raises:
        SlmError: they do not match.
    """
    kind = config.reference_update.reference_update
    if models.reference is None or not config.reference_update.updates:
        return
    if models.reference.architecture != models.architecture:
        raise ConfigError(
            "--reference-load",
            config.selection.reference_load,
            f"be of the model's architecture with --reference-update {kind}, which averages their weights",
            "use --reference-load init, or a checkpoint of this model",
        )
    if resume is not None and not any(name.startswith(f"{FILE_KIND}_") for name in resume.manifest.files):
        raise CheckpointError(
            "--load",
            str(resume.folder),
            f"contain the reference of a run with --reference-update {kind}",
            "load a checkpoint that was saved with it, or start a new run with --init-from",
        )


def check_entropies(config: RunConfig, selector: Selector, scores: StoredScores | None) -> None:
    """Check that stored scores hold the entropies that the score needs.

    Raises:
        ScoreStoreError: they do not.
    """
    if scores is not None and selector.needs("reference-entropy") and not scores.has_entropy:
        raise ScoreStoreError(
            "--reference-scores",
            config.selection.reference_scores,
            "hold entropies, required by --slm-score reference-entropy",
            "write them with tools/score_corpus.py --with-entropy, or choose another score",
        )


def check_distributions(config: RunConfig, scores: StoredScores | None, vocabulary_size: int) -> None:
    """Check that stored scores hold the distributions that the loss needs.

    Args:
        vocabulary_size: of the model.

    Raises:
        ScoreStoreError: they do not.
    """
    loss, folder = config.distillation.loss, config.selection.reference_scores
    if scores is None or not config.distillation.distills:
        return
    stored = scores.distribution
    if stored is None:
        raise ScoreStoreError(
            "--reference-scores",
            folder,
            f"hold log-probabilities, required by --loss {loss}",
            "write them with tools/score_corpus.py --top-logprobs 64, or use --reference-load",
        )
    if stored.kind == "sample" and loss != "kl":
        raise ScoreStoreError(
            f"--loss {loss}: --reference-scores",
            folder,
            "hold the largest log-probabilities; sampled ids are an unbiased sample for --loss kl alone",
            "write them with tools/score_corpus.py --top-logprobs 64, or use --loss kl",
        )
    if stored.kind == "top" and not stored.has_rest and stored.vocabulary_size != vocabulary_size:
        raise ScoreStoreError(
            "--reference-scores: vocabulary size",
            stored.vocabulary_size,
            f"be the model's, {vocabulary_size}, where all log-probabilities are stored",
            "store fewer with tools/score_corpus.py --top-logprobs",
        )


def check_selection_columns(config: RunConfig, data: RunData) -> None:
    """Check that the columns that the selection reads are of the corpora's content. Reads up to 256 MiB of each.

    Raises:
        CorpusError: a column was made for other tokens, or has weights below 0.
    """
    names, weight = config.selection.columns, config.selection.slm_weight or ""
    for corpus in (source.corpus for source in data.train.sources):
        check_columns(corpus, names)
        if not weight.startswith(EXTERNAL):
            continue
        minimum = read_column_sidecar(corpus, weight.removeprefix(EXTERNAL)).minimum
        if minimum < 0:
            field = f"--slm-weight {weight}: least number beside {corpus.prefix}"
            raise CorpusError(field, minimum, "be at least 0", "write weights, or use it as --slm-score")


def warn_of_unused_flags(config: RunConfig, held_out: dict[str, SequentialSamples]) -> None:
    """Warn of evaluations and data phases that this run never reaches."""
    logging_config = config.logging
    for flag, value in (
        ("--eval-interval", logging_config.eval_interval),
        ("--eval-at-start", logging_config.eval_at_start),
    ):
        if value and not held_out and logging_config.probe_file is None:
            logger.warning("%s has no effect: --split and --valid-data-path hold out no set", flag)
    num_steps = config.training.train_iters
    for phase in parse_phases(config.data.data_phases):
        if phase.first_step >= num_steps:
            logger.warning(
                "--data-phases: the phase at step %d has no effect in a run of %d steps", phase.first_step, num_steps
            )


def warn_of_long_sequences(config: RunConfig, model: Architecture, references: Sequence[Architecture]) -> None:
    """Warn of samples that are longer than the positions a model was trained for, which may be intended."""
    for what, arch in (("model", model), *(("reference", reference) for reference in references)):
        if config.data.seq_length > arch.max_position_embeddings:
            logger.warning(
                "--seq-length is %d: longer than the %d positions of the %s (max_position_embeddings)",
                config.data.seq_length, arch.max_position_embeddings, what,
            )  # fmt: skip


def _check_distilled_vocabulary(config: RunConfig, model: int, reference: int) -> None:
    if model > reference:
        raise VocabularyError(
            "--reference-load: vocabulary size",
            reference,
            f"be at least the model's, {model}, with --loss {config.distillation.loss}, which compares distributions",
            "use a reference with as many rows in its output weight or more, or --loss ce",
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
                f"be that of the loaded reference ({loaded})",
                "name the shape of --reference-load, or leave it out",
            )


def _check_vocabularies(config: RunConfig, models: Models, resume: Resume | None) -> None:
    tokenizer, vocab_size = models.tokenizer, models.architecture.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            "vocabulary size of the model",
            vocab_size,
            f"be at least the tokenizer's {tokenizer.vocab_size}",
            "use the tokenizer that belongs to the model",
        )
    if models.init is not None:
        check_model_vocabulary(models.init, config, tokenizer, field="--init-from", path=config.model.init_from)
    if models.reference is not None:
        path = config.reference_path
        check_model_vocabulary(models.reference, config, tokenizer, field="--reference-load", path=path)
    if models.reference_base is not None:
        path = config.reference_base_path
        check_model_vocabulary(models.reference_base, config, tokenizer, field="--reference-base", path=path)
    fingerprint = resume.manifest.tokenizer_fingerprint if resume else None
    if fingerprint is not None and fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            "--load: tokenizer",
            fingerprint[:12],
            f"have the token table of the run's tokenizer ({tokenizer.fingerprint()[:12]})",
            "use the tokenizer of the run that is resumed",
        )


def check_model_vocabulary(
    model: Model, config: RunConfig, tokenizer: Tokenizer, *, field: str, path: str | None
) -> None:
    """Check that a model on disk and the run's tokenizer give every token id the same meaning.

    Args:
        field, path: the flag that names the model and its value, for errors.

    Raises:
        VocabularyError: the model has too few tokens, another token table, or no tokenizer to compare.
    """
    if model.architecture.vocab_size < tokenizer.vocab_size:
        raise VocabularyError(
            f"{field}: vocabulary size",
            model.architecture.vocab_size,
            f"be at least the tokenizer's {tokenizer.vocab_size}",
            "use a model of the same vocabulary",
        )
    if config.data.tokenizer_type == "NullTokenizer":
        return  # ids without a table: sizes are all there is to compare
    if model.tokenizer_folder is None:
        raise VocabularyError(
            f"{field}: tokenizer",
            path,
            "contain the tokenizer it was trained with, so that the vocabularies can be compared token by token",
            "copy its tokenizer files into the folder",
        )
    theirs = build_tokenizer("HuggingFaceTokenizer", str(model.tokenizer_folder))
    check_same_vocabulary(tokenizer, theirs, "--tokenizer-model", field)
