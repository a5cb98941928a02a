"""A run, checked and laid out: everything that can be known before a process group or a weight exists.

Whatever is wrong with flags, layout, files or vocabularies is found here, so that a dry run and a real run
refuse the same things in the same words.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_slm.checkpoint.format import Manifest, find_checkpoint, verify_files
from megatron_slm.config import Architecture, RunConfig
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.convert.source import Model, open_model
from megatron_slm.data.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples, SequentialSamples, split_bounds
from megatron_slm.data.sidecar import read_sidecar
from megatron_slm.data.tokenizers import Tokenizer, build_tokenizer, check_same_vocabulary
from megatron_slm.errors import CheckpointError, ConfigError, LayoutError, VocabularyError
from megatron_slm.model.llama import layer_list
from megatron_slm.model.partition import check_stages
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The checkpoint that a run goes on from."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a run will be."""

    config: RunConfig
    topology: Topology
    architecture: Architecture
    tokenizer: Tokenizer
    init: Model | None
    reference: Model | None
    resume: Resume | None
    train_samples: PackedSamples
    held_out: dict[str, SequentialSamples]
    global_batch_size: int
    deepspeed: dict[str, Any]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on one data-parallel rank."""
        return self.global_batch_size // (self.config.training.micro_batch_size * self.topology.data)

    @property
    def dtype(self) -> torch.dtype:
        """What the models compute in."""
        return torch.bfloat16 if self.config.training.bf16 else torch.float32

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 1 to 3."""
        return ds_config.zero_stage(self.deepspeed)


def make_plan(config: RunConfig, world_size: int, *, rank: int = 0) -> Plan:
    """Check a configuration against the world, the files and itself.

    Args:
        rank: rank 0 also compares checksums of checkpoints.

    Raises:
        SlmError: with the field, the value, the rule and the fix.
    """
    parallel = config.parallel
    topology = Topology.from_world(
        world_size, tensor=parallel.tensor_model_parallel_size, pipeline=parallel.pipeline_model_parallel_size
    )
    user_deepspeed = ds_config.read_json(parallel.deepspeed_config)
    ds_config.check_zero(ds_config.zero_stage(user_deepspeed), config)
    global_batch_size, num_micro_batches = batch_arithmetic(config, topology)
    thorough = rank == 0
    resume = _open_resume(config, checksums=thorough)
    init = _open(config.model.init_from, "--init-from", checksums=thorough)
    tokenizer = _open_tokenizer(config, init)
    architecture = resolve_architecture(config, init, resume, tokenizer)
    reference = _open(config.selection.reference_load, "--reference-load", checksums=thorough)
    check_layout(architecture, config, topology, what="model")
    check_stages(architecture.num_layers, topology.pipeline)
    _check_vocabularies(config, architecture, tokenizer, init, reference, resume)
    if reference is not None:
        check_layout(reference.architecture, config, topology, what="reference")
    train, held_out = _open_data(config, tokenizer, architecture, config.training.train_iters * global_batch_size)
    return Plan(
        config=config,
        topology=topology,
        architecture=architecture,
        tokenizer=tokenizer,
        init=init,
        reference=reference,
        resume=resume,
        train_samples=train,
        held_out=held_out,
        global_batch_size=global_batch_size,
        deepspeed=ds_config.resolve(
            user_deepspeed, config, data_parallel_size=topology.data, num_micro_batches=num_micro_batches
        ),
    )


def batch_arithmetic(config: RunConfig, topology: Topology) -> tuple[int, int]:
    """(global batch size, micro-batches of a step on one data-parallel rank).

    Raises:
        LayoutError: the global batch is not a multiple of micro-batch size x data-parallel size.
    """
    together = config.training.micro_batch_size * topology.data
    total = config.training.global_batch_size or together
    if total % together:
        raise LayoutError(
            "--global-batch-size",
            total,
            f"is a multiple of --micro-batch-size ({config.training.micro_batch_size}) x data-parallel size "
            f"({topology.data})",
            f"use {-(-total // together) * together}, or change the micro-batch size",
        )
    return total, total // together


def _open(path: str | None, field: str, *, checksums: bool) -> Model | None:
    return None if path is None else open_model(path, field=field, checksums=checksums)


def _open_resume(config: RunConfig, *, checksums: bool) -> Resume | None:
    if config.checkpoint.load is None:
        return None
    folder = find_checkpoint(config.checkpoint.load)
    manifest = Manifest.read(folder)
    verify_files(folder, manifest, checksums=checksums)
    if manifest.step >= config.training.train_iters:
        raise CheckpointError(
            "--train-iters",
            config.training.train_iters,
            f"is beyond the checkpoint's step {manifest.step}",
            "raise --train-iters, or load an earlier checkpoint",
        )
    return Resume(folder=folder, manifest=manifest)


def _open_tokenizer(config: RunConfig, init: Model | None) -> Tokenizer:
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
    return build_tokenizer(data.tokenizer_type, model, data.vocab_size)


def resolve_architecture(
    config: RunConfig, init: Model | None, resume: Resume | None, tokenizer: Tokenizer
) -> Architecture:
    """The model's architecture: from --init-from or --load if given, else from the flags.

    Raises:
        ConfigError: a flag contradicts the checkpoint, or a needed flag is missing.
    """
    model, given = config.model, _given_fields(config)
    stored = init.architecture if init else resume.manifest.architecture if resume else None
    if stored is not None:
        for name, value in given.items():
            if getattr(stored, name) != value:
                raise ConfigError(
                    _FLAGS[name],
                    value,
                    f"agrees with the checkpoint, which says {getattr(stored, name)!r}",
                    "leave the flag out; the architecture comes from the checkpoint",
                )
        architecture = stored
    else:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            if name not in given:
                raise ConfigError(_FLAGS[name], None, "is given, or --init-from is", "describe the model")
        heads, hidden = model.num_attention_heads or 0, model.hidden_size or 0
        if "kv_channels" not in given and hidden % heads:
            raise LayoutError(
                "--hidden-size",
                hidden,
                f"is divisible by --num-attention-heads ({heads})",
                "change one of them, or give --kv-channels",
            )
        defaults = {
            "num_query_groups": heads,
            "kv_channels": hidden // heads,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": config.data.seq_length,
        }
        architecture = Architecture(**{**defaults, **given})
    if resume is not None and resume.manifest.architecture != architecture:
        raise CheckpointError(
            "--load",
            str(resume.folder),
            "was written by a run of the same architecture",
            "use --init-from to start a new run from other weights",
        )
    return architecture


_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "max_position_embeddings": "--max-position-embeddings",
    "norm_epsilon": "--norm-epsilon",
    "rotary_base": "--rotary-base",
    "rope_scaling": "--rope-scaling",
    "qkv_bias": "--add-qkv-bias",
    "sliding_window": "--window-size",
    "initializer_range": "--init-method-std",
    "tied": "--untie-embeddings-and-output-weights",
}
"""The flag that sets each field of an architecture."""


def _given_fields(config: RunConfig) -> dict[str, Any]:
    model = config.model
    named = {field: getattr(model, flag[2:].replace("-", "_")) for field, flag in _FLAGS.items()}
    if model.untie_embeddings_and_output_weights is not None:
        named["tied"] = not model.untie_embeddings_and_output_weights
    return {field: value for field, value in named.items() if value is not None}


def check_layout(arch: Architecture, config: RunConfig, topology: Topology, *, what: str) -> None:
    """Make every layer of one tensor-parallel rank on the meta device, which refuses what cannot be cut.

    Raises:
        LayoutError: heads, groups, widths, vocabulary or sequence are not divisible by the tensor-parallel size.
    """
    if config.parallel.sequence_parallel and config.data.seq_length % topology.tensor:
        raise LayoutError(
            "--seq-length",
            config.data.seq_length,
            f"is divisible by --tensor-model-parallel-size ({topology.tensor}) with sequence parallelism",
            "change one of them",
        )
    tp = TensorParallel(size=topology.tensor)
    layers = ParallelLayers(tp, vocabulary_divisible_by=config.model.make_vocab_size_divisible_by)
    try:
        with torch.device("meta"):
            for maker in layer_list(replace(arch, num_layers=1), layers):
                maker.make()
    except LayoutError as error:
        raise LayoutError(f"{what}: {error.field}", error.value, error.rule, error.fix) from error


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
            _check_model_vocabulary(model, field, tokenizer, config)
    fingerprint = resume.manifest.tokenizer_fingerprint if resume else None
    if fingerprint is not None and fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            "--load: tokenizer",
            fingerprint[:12],
            "is the run's tokenizer, by token table",
            "use the tokenizer of the run that is resumed",
        )


def _check_model_vocabulary(model: Model, field: str, tokenizer: Tokenizer, config: RunConfig) -> None:
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


def _open_data(
    config: RunConfig, tokenizer: Tokenizer, arch: Architecture, num_samples: int
) -> tuple[PackedSamples, dict[str, SequentialSamples]]:
    data = config.data
    if not data.data_path:
        raise ConfigError(
            "--data-path", data.data_path, "names a corpus", "give the PREFIX of PREFIX.bin and PREFIX.idx"
        )
    corpus = open_corpus(data.data_path[0], tokenizer, arch)
    bounds = split_bounds(data.split, corpus.num_sequences)
    train = PackedSamples(
        corpus, *bounds[0], sequence_length=data.seq_length, num_samples=num_samples, seed=config.training.seed
    )
    held_out = {}
    if bounds[1][0] < bounds[1][1]:
        held_out["valid"] = SequentialSamples(corpus, *bounds[1], sequence_length=data.seq_length)
    for entry in data.valid_data_path:
        name, given, prefix = entry.partition("=")
        if not given:
            name, prefix = Path(entry).name, entry
        if name in held_out:
            raise ConfigError(
                "--valid-data-path", entry, f"has a name of its own ({name} is taken)", "write NAME=PREFIX"
            )
        other = open_corpus(prefix, tokenizer, arch)
        held_out[name] = SequentialSamples(other, 0, other.num_sequences, sequence_length=data.seq_length)
    return train, held_out


def open_corpus(prefix: str, tokenizer: Tokenizer, arch: Architecture) -> IndexedCorpus:
    """Open a corpus and check that its token ids mean what the run's tokenizer says.

    Raises:
        CorpusError, VocabularyError: it is damaged, empty, of another tokenizer, or holds ids beyond the vocabulary.
    """
    corpus = IndexedCorpus(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        logger.warning("%s has no .meta.json, so its tokenizer cannot be checked; its token ids are", prefix)
    elif sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"is the run's tokenizer ({tokenizer.fingerprint()[:12]}), by token table",
            "preprocess the text with the run's tokenizer, or name the corpus' tokenizer",
        )
    corpus.check_vocabulary(arch.vocab_size)
    return corpus
