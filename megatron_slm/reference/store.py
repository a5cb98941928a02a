"""Reference scores on disk: shards that are whole or absent, read in place and checked row by row."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.errors import ScoreStoreError, os_errors_as
from megatron_slm.files import check_writable, file_sha256, write_durably
from megatron_slm.reference.manifest import MANIFEST, StoreManifest, check_same_settings, shard_name
from megatron_slm.reference.probabilities import Probabilities
from megatron_slm.types import MicroBatch

CHECKSUM_LIMIT_BYTES = 64 << 30
"""Stores up to this size have all their checksums compared at start, larger ones those of as many shards as fit."""

_OPEN_SHARDS = 8
_DAMAGED = "run tools/score_corpus.py on it again with the same flags: it scores what is missing or damaged"


class Scores(NamedTuple):
    """The reference's statistics of some samples."""

    loss_bs: Tensor
    """-log P(label) in nats [b, s], of every position, masked or not."""
    entropy_bs: Tensor | None
    """Entropy of the predicted distribution in nats [b, s]; None in stores without entropies."""
    probabilities: Probabilities | None = None
    """A few ids of the predicted distribution; None in stores without them."""


def token_digests(batch: MicroBatch) -> list[int]:
    """Compute a checksum of every sample's number and its s + 1 tokens (64 bits, signed); the batch is on the CPU."""
    tokens = torch.cat([batch.tokens_bs, batch.labels_bs[:, -1:]], dim=1).contiguous().numpy()
    return [_digest(number, row) for number, row in zip(batch.sample_b.tolist(), tokens, strict=True)]


def _digest(sample: int, *rows: Any) -> int:
    digest = hashlib.blake2b(sample.to_bytes(8, "little"), digest_size=8)
    for row in rows:
        digest.update(row)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _score_digest(sample: int, rows: Sequence[Tensor]) -> int:
    return _digest(sample, *(row.contiguous().view(torch.uint8).numpy() for row in rows))


def _identity(manifest: StoreManifest, shard: int) -> str:
    """Identify a shard in its header, in one value: safetensors writes several in an order that changes."""
    return f"shard {shard} of store {manifest.store_id}"


# ---- writing ------------------------------------------------------------------------------------------------


def begun(folder: Path, wanted: StoreManifest) -> StoreManifest | None:
    """Return the manifest of the store that was begun in a folder; None for a new or empty one. Changes nothing.

    Raises:
        ScoreStoreError: the folder cannot be written, or holds something else, or a store of other settings.
    """
    with _output_errors(folder):
        check_writable(folder)
        inside = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if not inside:
        return None
    if MANIFEST not in inside:
        raise ScoreStoreError(
            "--output", str(folder), f"be empty or hold a store's {MANIFEST}, not {inside[0]}", "choose another folder"
        )
    found = StoreManifest.read(folder)
    check_same_settings(folder, found, wanted)
    return found


def _output_errors(folder: Path) -> AbstractContextManager[None]:
    return os_errors_as(ScoreStoreError, "--output", str(folder), "be a folder that can be written", "choose another")


def begin(folder: Path, wanted: StoreManifest) -> StoreManifest:
    """Create a store's folder, or resume one that was begun; return its settings and the shards that are whole.

    Raises:
        ScoreStoreError: see `begun`.
    """
    found = begun(folder, wanted)
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if found is None:
            wanted.write(folder)
            return wanted
        for leftover in folder.glob(".*.tmp"):  # of passes that were killed
            leftover.unlink()
    damage = _compare(folder, list(found.shards.items()), checksums=True)
    return found.with_shards({name: entry for name, entry in found.shards.items() if name not in damage})


def write_shard(
    folder: Path, manifest: StoreManifest, shard: int, scores: Scores, digests: Sequence[int]
) -> dict[str, Any]:
    """Write one shard atomically; it is on the disk when this returns.

    Args:
        scores: of `manifest.samples_of(shard)`, one row a sample, on the CPU; losses and entropies in fp32.
        digests: of the same samples' tokens (`token_digests`).

    Returns:
        its entry in the manifest.

    Raises:
        ScoreStoreError: a loss is not finite, or the shard cannot be written.
    """
    samples = manifest.samples_of(shard)
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    tensors = {"loss": scores.loss_bs.to(dtype)}
    if manifest.with_entropy:
        if scores.entropy_bs is None:
            raise ScoreStoreError(
                "--with-entropy", True, "have a loss head that computes entropies", "leave --with-entropy out"
            )
        tensors["entropy"] = scores.entropy_bs.to(dtype)
    for name, rows in tensors.items():
        if not bool(rows.isfinite().all()):
            row = int((~rows.isfinite()).any(dim=1).nonzero()[0])
            raise ScoreStoreError(
                f"{name} of sample {samples[row]}",
                "not finite",
                f"be a number that {manifest.dtype} can hold",
                "check the reference's weights, or choose another --score-dtype",
            )
    if manifest.distribution is not None:
        assert scores.probabilities is not None, "a pass computes the distributions of its manifest"
        names = Probabilities.names(manifest.distribution)
        tensors |= zip(names, [x for x in scores.probabilities if x is not None], strict=True)
    kept = list(tensors.values())
    row_digests = [_score_digest(number, [rows[i] for rows in kept]) for i, number in enumerate(samples)]
    tensors["token_digest"] = torch.tensor(digests, dtype=torch.int64)
    tensors["score_digest"] = torch.tensor(row_digests, dtype=torch.int64)
    content = save(tensors, metadata={"place": _identity(manifest, shard)})
    with os_errors_as(
        ScoreStoreError, "--output", folder, "be a folder that can be written", "free space and run the pass again"
    ):
        write_durably(folder / shard_name(shard), content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ---- checking -----------------------------------------------------------------------------------------------


def check_shards(folder: Path, manifest: StoreManifest, *, checksums: bool, whole: bool = False) -> None:
    """Compare a store's files with its manifest.

    Args:
        checksums: compare contents too, not sizes alone; one rank of a run is enough.
        whole: compare every checksum, also of a store larger than `CHECKSUM_LIMIT_BYTES`.

    Raises:
        ScoreStoreError: a shard is not scored yet, missing, or of another size or checksum.
    """
    missing = [name for name in map(shard_name, range(manifest.num_shards)) if name not in manifest.shards]
    if missing:
        raise ScoreStoreError(
            f"--reference-scores {folder}",
            f"{manifest.num_shards - len(missing)} shards",
            f"be complete, all {manifest.num_shards} shards ({missing[0]} is missing)",
            "run tools/score_corpus.py with the same flags to its end",
        )
    entries = list(manifest.shards.items())
    damage = _compare(folder, entries, checksums=False)
    if checksums and not damage:
        total = sum(entry["size"] for _, entry in entries)
        stride = 1 if whole else max(1, ceil_div(total, CHECKSUM_LIMIT_BYTES))
        damage = _compare(folder, entries[::stride], checksums=True)
    for name, (found, rule) in damage.items():
        raise ScoreStoreError(str(folder / name), found, rule, _DAMAGED)


def _compare(
    folder: Path, entries: Sequence[tuple[str, dict[str, Any]]], *, checksums: bool
) -> dict[str, tuple[str, str]]:
    """Return by name, for every file that differs from its entry, the found value and the rule it breaks."""

    def one(item: tuple[str, dict[str, Any]]) -> tuple[str, str] | None:
        name, entry = item
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != entry["size"]:
            return "missing" if size < 0 else f"{size} bytes", f"be {entry['size']} bytes long"
        if checksums and (found := file_sha256(path)) != entry["sha256"]:
            return f"sha256 {found[:12]}", f"have the manifest's sha256 {entry['sha256'][:12]}"
        return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        results = list(pool.map(one, entries))
    return {name: found for (name, _), found in zip(entries, results, strict=True) if found is not None}


# ---- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenShard:
    scores: list[Any]
    """Slices in the mapped file: losses, entropies and probabilities, those that there are."""
    token_digests: list[int]
    score_digests: list[int]


class ScoreReader:
    """A store's scores by sample number, at random access; files are mapped, not loaded."""

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, batch: MicroBatch) -> Scores:
        """Read the scores of a micro-batch's samples on the CPU, losses in fp32; the batch is on the CPU too.

        Raises:
            ScoreStoreError: the store has no such sample, its tokens differ from the scored ones, or the scores differ
                from the written ones.
        """
        rows = [
            self._row(number, digest)
            for number, digest in zip(batch.sample_b.tolist(), token_digests(batch), strict=True)
        ]
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        num_scores = 1 + self.manifest.with_entropy
        loss_bs, *entropy = (column.float() for column in columns[:num_scores])
        probabilities = Probabilities(*columns[num_scores:]) if self.manifest.distribution is not None else None
        return Scores(loss_bs, entropy[0] if entropy else None, probabilities)

    def _row(self, sample: int, token_digest: int) -> list[Tensor]:
        if not 0 <= sample < self.manifest.data.num_samples:
            raise ScoreStoreError(
                f"--reference-scores {self.folder}: samples",
                self.manifest.data.num_samples,
                f"be more than {sample}, the number of a sample of the run",
                "shorten the run, or score again with its --train-iters and --global-batch-size",
            )
        shard, at = divmod(sample, self.manifest.samples_per_shard)
        held = self._shard(shard)
        path = self.folder / shard_name(shard)
        if held.token_digests[at] != token_digest:
            raise ScoreStoreError(
                f"sample {sample}: tokens",
                f"checksum {token_digest:x}",
                f"be the tokens that {path} was scored with, checksum {held.token_digests[at]:x}",
                "score again: the corpus changed since",
            )
        rows = [part[at : at + 1] for part in held.scores]
        found = _score_digest(sample, [row[0] for row in rows])
        if found != held.score_digests[at]:
            raise ScoreStoreError(
                f"{path}: scores of sample {sample}",
                f"checksum {found:x}",
                f"have the checksum that they were written with, {held.score_digests[at]:x}",
                _DAMAGED,
            )
        return rows

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self._map(shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[shard]

    def _map(self, shard: int) -> _OpenShard:
        path = self.folder / shard_name(shard)
        names = ["loss", "entropy"] if self.manifest.with_entropy else ["loss"]
        expected = [len(self.manifest.samples_of(shard)), self.manifest.data.sequence_length]
        wanted = [expected] * len(names)
        if (distribution := self.manifest.distribution) is not None:
            names += (more := Probabilities.names(distribution))
            wanted += [expected if name.endswith("rest") else [*expected, distribution.count] for name in more]
        try:
            file = safe_open(path, framework="pt")
            identity = (file.metadata() or {}).get("place")
            parts = [file.get_slice(name) for name in names]
            digests = [file.get_tensor(name).tolist() for name in ("token_digest", "score_digest")]
        except (SafetensorError, OSError) as error:
            raise ScoreStoreError(str(path), str(error), "be a whole shard of scores", _DAMAGED) from error
        if identity != _identity(self.manifest, shard):
            raise ScoreStoreError(str(path), identity, f"be {_identity(self.manifest, shard)}", _DAMAGED)
        shapes = [part.get_shape() for part in parts] + [[len(column)] for column in digests]
        if shapes != wanted + [expected[:1]] * 2:
            raise ScoreStoreError(str(path), f"shapes {shapes}", f"hold {expected} scores", _DAMAGED)
        return _OpenShard(parts, *digests)
