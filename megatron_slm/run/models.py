"""The models of a run and their tokenizer, opened without reading weights."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.config.selection import START_MODEL
from megatron_slm.convert.source import Model
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.run.resume import Resume
from megatron_slm.run.tokenizer import open_if_named, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class Models:
    """The trained model's architecture, the models on disk, and the tokenizer they share."""

    tokenizer: Tokenizer
    architecture: Architecture
    """Of the trained model."""
    init: Model | None
    """--init-from"""
    reference: Model | None
    """--reference-load; None also where the reference's scores are read from stores."""
    reference_base: Model | None = None
    """--reference-base"""

    @property
    def references(self) -> list[Architecture]:
        """Architectures of the references that run, the base last: none, one or two."""
        return [model.architecture for model in (self.reference, self.reference_base) if model is not None]

    @property
    def architectures(self) -> list[Architecture]:
        """Architectures of the model and of the references that run."""
        return [self.architecture, *self.references]

    @property
    def num_tokens(self) -> int:
        """Exclusive upper bound of the corpora's token ids: the smallest vocabulary of model and references."""
        return min(arch.vocab_size for arch in self.architectures)


def open_models(config: RunConfig, resume: Resume | None, *, share: tuple[int, int]) -> Models:
    """Open the models that a configuration names.

    Args:
        share: (i, n) compares the i-th of n shares of the checkpoints' files with their manifests.

    Raises:
        SlmError: a model or the tokenizer is missing or unreadable, or the architecture contradicts a flag.
    """
    init = open_if_named(config.model.init_from, "--init-from", checksums=True, share=share)
    tokenizer = open_tokenizer(config, init)

    def opened(path: str | None, field: str) -> Model | None:
        return init if path == START_MODEL else open_if_named(path, field, checksums=True, share=share)

    reference = base = None
    if not config.selection.reference_scores:
        reference = opened(config.selection.reference_load, "--reference-load")
        base = opened(config.selection.reference_base, "--reference-base")
    architecture = resolve_architecture(
        config, _stored_architecture(init, resume), tokenizer.vocab_size, starts=init is not None
    )
    return Models(tokenizer=tokenizer, architecture=architecture, init=init, reference=reference, reference_base=base)


def _stored_architecture(init: Model | None, resume: Resume | None) -> Architecture | None:
    if init is not None:
        return init.architecture
    return None if resume is None else resume.manifest.architecture
