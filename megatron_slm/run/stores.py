"""Opens a run's stores of reference scores and validates them against the run and each other."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_slm.config.run import RunConfig
from megatron_slm.convert.source import open_model
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.data.corpus.indexed import bin_path
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ScoreStoreError
from megatron_slm.reference.manifest import ScoredData, StoreManifest, check_data
from megatron_slm.reference.store import ScoreReader, check_shards
from megatron_slm.reference.stored import StoredScores
from megatron_slm.run.sample_order import document_treatment


def scored_data(config: RunConfig, tokenizer: Tokenizer, samples: BlendedSamples, *, with_content: bool) -> ScoredData:
    """Identify the samples that a run draws.

    Args:
        with_content: read the corpora for their checksum (up to 256 MiB of each).
    """
    return ScoredData(
        sequence_length=config.data.seq_length,
        sequences=tuple(bound for source in samples.sources for bound in source.sequences),
        seed=config.training.seed,
        corpus_bytes=sum(bin_path(source.corpus.prefix).stat().st_size for source in samples.sources),
        corpus_sha256=_content(samples) if with_content else None,
        tokenizer=tokenizer.fingerprint(),
        num_epochs=sum(order.num_epochs for source in samples.sources for order in source.orders),
        sample_order=samples.order_fingerprint,
        num_samples=len(samples),
        documents=document_treatment(config),
    )


def _content(samples: BlendedSamples) -> str:
    """Checksum of all corpora and their loss masks; of a single corpus its own checksum."""
    parts = [content_sha256(corpus) for source in samples.sources for corpus in source.corpora]
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_scores(
    config: RunConfig, tokenizer: Tokenizer, samples: BlendedSamples, *, thorough: bool
) -> StoredScores | None:
    """Open the stores of `--reference-scores` for a run of these samples; None without the flag.

    Args:
        thorough: also compare checksums, and the reference of --reference-load; one rank of a run is enough.

    Raises:
        ScoreStoreError: a store is missing, incomplete, damaged, of other samples or of another reference, or two
            stores are of one reference.
    """
    selection = config.selection
    if not selection.reference_scores:
        return None
    data = scored_data(config, tokenizer, samples, with_content=thorough)
    readers: list[ScoreReader] = []
    for folder in map(Path, selection.reference_scores):
        manifest = StoreManifest.read(folder)
        check_data(folder, manifest.data, data)
        _check_references_differ(folder, manifest, readers)
        check_shards(folder, manifest, checksums=thorough, whole=selection.reference_scores_verify == "whole")
        readers.append(ScoreReader(folder, manifest))
    if thorough and config.reference_path is not None:
        _check_reference(config.reference_path, readers[0])
    return StoredScores(readers, selection.reference_scores_combine or "mean")


def _check_references_differ(folder: Path, manifest: StoreManifest, others: list[ScoreReader]) -> None:
    for other in others:
        if other.manifest.reference_sha256 == manifest.reference_sha256:
            raise ScoreStoreError(
                "--reference-scores",
                f"{other.folder} and {folder}",
                f"be of different references, but both are of {manifest.reference} ({manifest.reference_sha256[:12]})",
                "name one of them",
            )


def _check_reference(path: str, reader: ScoreReader) -> None:
    wanted = open_model(path, field="--reference-load").content_sha256()
    stored = reader.manifest
    if stored.reference_sha256 != wanted:
        raise ScoreStoreError(
            f"--reference-scores {reader.folder}: reference",
            f"{stored.reference} ({stored.reference_sha256[:12]})",
            f"be the one of --reference-load, {path} ({wanted[:12]})",
            "score with this reference, or leave --reference-load out",
        )
