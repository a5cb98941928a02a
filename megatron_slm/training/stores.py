"""The run's stores of reference scores: opened, and compared with the run and with each other."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.config import RunConfig
from megatron_slm.convert.source import open_model
from megatron_slm.data.content import content_sha256
from megatron_slm.data.indexed import bin_path
from megatron_slm.data.packing import PackedSamples, split_bounds
from megatron_slm.data.tokenizers import Tokenizer
from megatron_slm.errors import ScoreStoreError
from megatron_slm.reference.manifest import Manifest, ScoredData, check_data
from megatron_slm.reference.store import ScoreReader, check_shards
from megatron_slm.reference.stored import StoredScores


def scored_data(
    config: RunConfig, tokenizer: Tokenizer, samples: PackedSamples, num_samples: int, *, with_content: bool
) -> ScoredData:
    """What identifies the samples that a run draws.

    Args:
        num_samples: how many it draws.
        with_content: read the corpus for its checksum (up to 256 MiB of it).
    """
    corpus = samples.corpus
    return ScoredData(
        sequence_length=config.data.seq_length,
        sequences=split_bounds(config.data.split, corpus.num_sequences)[0],
        seed=config.training.seed,
        corpus_bytes=bin_path(corpus.prefix).stat().st_size,
        corpus_sha256=content_sha256(corpus) if with_content else None,
        tokenizer=tokenizer.fingerprint(),
        num_epochs=samples.num_epochs,
        sample_order=samples.order_fingerprint,
        num_samples=num_samples,
    )


def open_scores(config: RunConfig, data: ScoredData, *, thorough: bool) -> StoredScores:
    """Open the stores of `--reference-scores` for a run of these samples.

    Args:
        thorough: also compare checksums, and the reference of --reference-load; one rank of a run is enough.

    Raises:
        ScoreStoreError: a store is missing, incomplete, damaged, of other samples or of another reference, or two
            stores are of one reference.
    """
    selection = config.selection
    readers: list[ScoreReader] = []
    for given in selection.reference_scores:
        folder = Path(given)
        manifest = Manifest.read(folder)
        check_data(folder, manifest.data, data)
        _check_references_differ(folder, manifest, readers)
        check_shards(folder, manifest, checksums=thorough, whole=selection.reference_scores_verify == "whole")
        readers.append(ScoreReader(folder, manifest))
    if thorough and selection.reference_load is not None:
        _check_reference(selection.reference_load, readers[0])
    return StoredScores(readers, selection.reference_scores_combine or "mean")


def _check_references_differ(folder: Path, manifest: Manifest, others: list[ScoreReader]) -> None:
    for other in others:
        if other.manifest.reference_sha256 == manifest.reference_sha256:
            raise ScoreStoreError(
                "--reference-scores",
                f"{other.folder} and {folder}",
                f"are of different references, but both are of {manifest.reference} ({manifest.reference_sha256[:12]})",
                "name one of them",
            )


def _check_reference(path: str, reader: ScoreReader) -> None:
    wanted = open_model(path, field="--reference-load").content_sha256()
    stored = reader.manifest
    if stored.reference_sha256 != wanted:
        raise ScoreStoreError(
            f"--reference-scores {reader.folder}: reference",
            f"{stored.reference} ({stored.reference_sha256[:12]})",
            f"is the one of --reference-load, {path} ({wanted[:12]})",
            "score with this reference, or leave --reference-load out",
        )
