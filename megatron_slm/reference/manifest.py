"""Manifest of a store of reference scores, and its comparison with a run.

    STORE/
        manifest.json                 the settings below, and size and sha256 of every finished shard
        scores_00000000.safetensors   samples [0, samples_per_shard) of the run's order, and so on

A sample's absolute number in the order of the run is the key: an epoch repeats documents, packed differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.format import versions
from megatron_slm.config.scoring import LogprobDtype, ScoreDtype
from megatron_slm.errors import ScoreStoreError
from megatron_slm.files import write_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 2 << 20
"""About the most tokens of a shard: 8 MiB of fp32 losses. Data-parallel ranks meet after each shard, so the slowest
pipeline must not take longer over one than the others wait for it."""
LEAST_SHARDS = 64
"""About the number of shards of a small store, so that data-parallel ranks have something to share."""

_SCORE_AGAIN = (
    "score the run's samples with tools/score_corpus.py and the run's own flags (its --load too, where it was "
    "extended), or train with the scored ones"
)


@dataclass(frozen=True, kw_only=True)
class ScoredData:
    """Identity of the scored samples: sample k of two equal ones is the same text. Each field names its flag."""

    sequence_length: int = field(metadata={"flag": "--seq-length"})
    sequences: tuple[int, ...] = field(metadata={"flag": "--split (training sequences of the corpus, from and to)"})
    seed: int = field(metadata={"flag": "--seed"})
    corpus_bytes: int = field(metadata={"flag": "--data-path (size of the .bin in bytes)"})
    corpus_sha256: str | None = field(metadata={"flag": "--data-path (checksum of the .bin)"})
    """None on ranks that do not compare it."""
    tokenizer: str = field(metadata={"flag": "--tokenizer-model (fingerprint of the token table)"})
    num_epochs: int = field(metadata={"flag": "epochs of the corpus (--train-iters x --global-batch-size)"})
    sample_order: str = field(metadata={"flag": "order of the samples"})
    num_samples: int = field(metadata={"flag": "samples (--train-iters x --global-batch-size)"})
    documents: str = field(
        default="concatenate",
        metadata={"flag": "--packing, --reset-attention-mask, --reset-position-ids and --fim-..."},
    )


@dataclass(frozen=True, kw_only=True)
class StoredDistribution:
    """The part of each token's distribution that a store has."""

    kind: Literal["top", "sample"]
    """The most probable ids, or a sample."""
    count: int
    """Ids a token."""
    dtype: LogprobDtype
    """Of the log-probabilities of `top`."""
    vocabulary_size: int
    """Of the reference."""

    @property
    def has_rest(self) -> bool:
        """True if there are other ids than the most probable ones."""
        return self.kind == "top" and self.count < self.vocabulary_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes that it takes of a store."""
        if self.kind == "sample":
            return 4 * self.count
        itemsize = 2 if self.dtype == "bfloat16" else 4
        return (4 + itemsize) * self.count + itemsize * self.has_rest

    def describe(self) -> str:
        """Return a short description for tables."""
        if self.kind == "sample":
            return f"{self.count} sampled ids"
        return f"the {self.count} largest log-probabilities in {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """A store's settings and its finished shards; files that it does not list are no part of the store."""

    data: ScoredData
    reference: str
    """The reference's folder, as passed to the scoring pass."""
    reference_sha256: str
    """Checksum of its weights and architecture."""
    computed_in: str
    """Dtype that the reference computed in: float32 or bfloat16."""
    dtype: ScoreDtype
    """Dtype of the stored losses and entropies."""
    with_entropy: bool
    samples_per_shard: int
    distribution: StoredDistribution | None = None
    """None in stores of losses (and entropies) alone."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size in bytes and sha256 of every finished shard."""
    versions: dict[str, str] = field(default_factory=lambda: dict(versions()))
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole store."""
        return ceil_div(self.data.num_samples, self.samples_per_shard)

    def samples_of(self, shard: int) -> range:
        """Return the numbers of a shard's samples."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.data.num_samples))

    @property
    def store_id(self) -> str:
        """SHA-256 of the settings. Every shard repeats it, so that no other store's shard is taken for this one's."""
        settings = {name: value for name, value in self._content().items() if name not in ("shards", "versions")}
        return hashlib.sha256(_canonical(settings)).hexdigest()

    def _content(self) -> dict[str, Any]:
        """The fields as JSON-compatible values; stores without distributions are as they were before there were any."""
        content = asdict(self)
        if self.distribution is None:
            del content["distribution"]
        return content

    def with_shards(self, shards: dict[str, dict[str, Any]]) -> StoreManifest:
        """Return the manifest of the same store with these shards."""
        return replace(self, shards=dict(sorted(shards.items())))

    def write(self, folder: Path) -> None:
        """Replace the manifest in `folder` atomically; it is on the disk when this returns."""
        content = self._content()
        content["checksum"] = hashlib.sha256(_canonical(content)).hexdigest()
        write_durably(folder / MANIFEST, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> StoreManifest:
        """Read a store's manifest.

        Raises:
            ScoreStoreError: it is missing, damaged, or of a format that this version cannot read.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            version, checksum = content["format_version"], content.pop("checksum")
        except OSError as error:
            raise ScoreStoreError(
                "--reference-scores",
                str(folder),
                f"hold a {MANIFEST} ({error.strerror})",
                "name a folder written by tools/score_corpus.py",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"be a JSON object with format_version and checksum ({error!r})") from error
        if version != FORMAT_VERSION:
            raise ScoreStoreError(
                f"{path}: format_version",
                version,
                f"be {FORMAT_VERSION} in this version of megatron_slm",
                "read it with the version that wrote it, or score again",
            )
        if checksum != hashlib.sha256(_canonical(content)).hexdigest():
            raise _damaged(path, "have the checksum that it was written with")
        data, stored = content.pop("data"), content.pop("distribution", None)
        try:
            distribution = None if stored is None else StoredDistribution(**stored)
            data = ScoredData(**{**data, "sequences": tuple(data["sequences"])})
            return cls(data=data, distribution=distribution, **content)
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"have the fields of this version ({error})") from error


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _damaged(path: Path, rule: str) -> ScoreStoreError:
    return ScoreStoreError(str(path), "damaged", rule, "copy the store again from its source, or score again")


def shard_name(shard: int) -> str:
    """Return a shard's file name."""
    return f"scores_{shard:08d}.safetensors"


def samples_per_shard(
    num_samples: int, sequence_length: int, micro_batch_size: int, *, distribution: StoredDistribution | None = None
) -> int:
    """Return the samples of a shard: many shards, none too large, each a whole number of micro-batches."""
    losses_per_token = 1 if distribution is None else 1 + distribution.bytes_per_token // 4
    most = max(1, SHARD_TOKENS // losses_per_token // sequence_length)
    wanted = min(most, ceil_div(num_samples, LEAST_SHARDS))
    return ceil_div(wanted, micro_batch_size) * micro_batch_size


def differences(stored: ScoredData, wanted: ScoredData) -> Iterator[tuple[str, Any, Any]]:
    """Yield (flag, stored value, wanted value) of every field that differs and makes other samples, the plainest first.

    The number of samples is left to the caller; a checksum that one side lacks is not compared.
    """
    for f in fields(ScoredData):
        theirs, ours = getattr(stored, f.name), getattr(wanted, f.name)
        if f.name != "num_samples" and None not in (theirs, ours) and theirs != ours:
            yield f.metadata["flag"], theirs, ours


def check_data(folder: Path, stored: ScoredData, wanted: ScoredData) -> None:
    """Check that a store holds a run's samples.

    Raises:
        ScoreStoreError: with the first setting that differs, the store's value and the run's.
    """
    for flag, theirs, ours in differences(stored, wanted):
        raise ScoreStoreError(f"--reference-scores {folder}: {flag}", theirs, f"be the run's, {ours!r}", _SCORE_AGAIN)
    if stored.num_samples < wanted.num_samples:
        raise ScoreStoreError(
            f"--reference-scores {folder}: samples",
            stored.num_samples,
            f"be at least the run's, {wanted.num_samples} (--train-iters x --global-batch-size)",
            "shorten the run, or score again with its --train-iters and --global-batch-size",
        )


def check_same_settings(folder: Path, found: StoreManifest, wanted: StoreManifest) -> None:
    """Check that a store was begun with the settings of this pass.

    Raises:
        ScoreStoreError: with the first setting that differs, the store's value and this pass's.
    """
    pairs = list(differences(found.data, wanted.data))
    flags = {
        "reference_sha256": "--reference-load (checksum of the weights)",
        "computed_in": "--bf16 (dtype that the reference computes in)",
        "dtype": "--score-dtype",
        "with_entropy": "--with-entropy",
        "distribution": "--top-logprobs, --sampled-ids and --logprobs-dtype",
    }
    if found.data.num_samples != wanted.data.num_samples:
        pairs.append(("samples (--train-iters x --global-batch-size)", found.data.num_samples, wanted.data.num_samples))
    pairs += [
        (flag, getattr(found, name), getattr(wanted, name))
        for name, flag in flags.items()
        if getattr(found, name) != getattr(wanted, name)
    ]
    for flag, theirs, ours in pairs:
        raise ScoreStoreError(
            f"--output {folder}: {flag}",
            theirs,
            f"be this pass's, {ours!r}",
            "pass the flags that the store was begun with, or choose another folder",
        )
