"""Checks of a run that need more than one section or a file."""

from __future__ import annotations

import logging

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.blends import parse_phases
from megatron_slm.config.run import RunConfig
from megatron_slm.convert.source import Model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.data.packing import SequentialSamples
from megatron_slm.data.tokenizers.registry import Tokenizer, build_tokenizer, check_same_vocabulary
from megatron_slm.errors import CheckpointError, ConfigError, ScoreStoreError, VocabularyError
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.job import architecture_at
from megatron_slm.reference.stored import StoredScores
from megatron_slm.run.layout import check_layout
from megatron_slm.run.resume import Resume
from megatron_slm.selection.selector import Selector

logger = logging.getLogger(__name__)


def warn_of_unused_flags(config: RunConfig, held_out: dict[str, SequentialSamples], num_steps: int) -> None:
    """Warn of evaluations and data phases that this run will never reach."""
    if config.logging.eval_interval is not None and not held_out and config.logging.probe_file is None:
        logger.warning("--eval-interval has nothing to evaluate: no set is held out by --split or --valid-data-path")
    for phase in parse_phases(config.data.data_phases):
        if phase.first_step >= num_steps:
            logger.warning("--data-phases: the phase at step %d never begins in %d steps", phase.first_step, num_steps)


def check_models(
    config: RunConfig,
    topology: Topology,
    arch: Architecture,
    tokenizer: Tokenizer,
    init: Model | None,
    reference: Model | None,
    resume: Resume | None,
) -> None:
    """Check model, reference and checkpoint against the layout, the vocabulary and each other."""
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


def check_profile(config: RunConfig, topology: Topology) -> None:
    """Check that the profiled ranks exist."""
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


def check_entropies(config: RunConfig, selector: Selector, scores: StoredScores | None) -> None:
    """Check that stored scores hold the entropies that the score needs."""
    if scores is not None and selector.needs("reference-entropy") and not scores.has_entropy:
        raise ScoreStoreError(
            "--reference-scores",
            config.selection.reference_scores,
            "hold entropies (--slm-score reference-entropy needs them)",
            "write them with tools/score_corpus.py --with-entropy, or choose another score",
        )


def check_best(config: RunConfig, held_out: dict[str, SequentialSamples]) -> None:
    """Check that --keep-best names a held-out set."""
    best = config.checkpoint.keep_best
    if best is not None and best not in held_out:
        known = ", ".join(held_out) or "there is none"
        raise ConfigError(
            "--keep-best", best, f"is the name of a held-out set ({known})", "name one, or add --valid-data-path"
        )


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
