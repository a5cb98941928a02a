"""A store on disk: what is written is read, and whatever was changed in between is refused, never trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_slm.errors import ScoreStoreError
from megatron_slm.reference import store
from megatron_slm.reference.manifest import (
    MANIFEST,
    SHARD_TOKENS,
    ScoredData,
    StoreManifest,
    check_data,
    samples_per_shard,
    shard_name,
)
from megatron_slm.reference.store import ScoreReader, Scores, begin, check_shards, token_digests, write_shard
from megatron_slm.reference.stored import StoredScores
from megatron_slm.types import MicroBatch

LENGTH, SAMPLES, PER_SHARD = 8, 10, 4
DATA = ScoredData(
    sequence_length=LENGTH, sequences=(0, 5), seed=1, corpus_bytes=100, corpus_sha256="c" * 64, tokenizer="t" * 64,
    num_epochs=2, sample_order="o" * 64, num_samples=SAMPLES,
)  # fmt: skip
SETTINGS = StoreManifest(
    data=DATA, reference="runs/reference", reference_sha256="r" * 64, computed_in="float32", dtype="float32",
    with_entropy=False, samples_per_shard=PER_SHARD,
)  # fmt: skip


def batch_of(*samples: int) -> MicroBatch:
    """Micro-batches whose tokens are a function of the sample's number; every third label is not valid."""
    tokens = torch.stack([torch.arange(LENGTH + 1) * 7 + 13 * number for number in samples])
    valid_bs = (torch.arange(LENGTH) % 3 != 0).expand(len(samples), LENGTH).clone()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), valid_bs, torch.tensor(samples))


def losses(*, seed: int = 0) -> torch.Tensor:
    return torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(seed)) * 9


def write_store(folder: Path, settings: StoreManifest = SETTINGS, *, seed: int = 0, upto: int | None = None) -> Path:
    manifest = begin(folder, settings)
    loss, entropy = losses(seed=seed), losses(seed=seed + 100)
    entries = {}
    for shard in range(manifest.num_shards)[:upto]:
        numbers = manifest.samples_of(shard)
        rows = slice(numbers.start, numbers.stop)
        scores = Scores(loss[rows], entropy[rows] if settings.with_entropy else None)
        entries[shard_name(shard)] = write_shard(folder, manifest, shard, scores, token_digests(batch_of(*numbers)))
        manifest.with_shards(entries).write(folder)
    return folder


def open_store(folder: Path, *, checksums: bool = True) -> ScoreReader:
    """As a run opens one."""
    manifest = StoreManifest.read(folder)
    check_data(folder, manifest.data, DATA)
    check_shards(folder, manifest, checksums=checksums)
    return ScoreReader(folder, manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["losses", "and entropies"])
def test_what_is_written_is_read(dtype: Any, with_entropy: bool, tmp_path: Path) -> None:
    settings = replace(SETTINGS, dtype=dtype, with_entropy=with_entropy)
    reader = open_store(write_store(tmp_path / "store", settings))
    scores = reader.read(batch_of(9, 0, 4, 3))  # any order, over three shards
    kind = getattr(torch, dtype)
    assert torch.equal(scores.loss_bs, losses()[[9, 0, 4, 3]].to(kind).float())
    assert (scores.entropy_bs is not None) == with_entropy
    if with_entropy:
        assert scores.entropy_bs is not None
        assert torch.equal(scores.entropy_bs, losses(seed=100)[[9, 0, 4, 3]].to(kind).float())
    sizes = [entry["size"] for entry in reader.manifest.shards.values()]
    payload = SAMPLES * LENGTH * kind.itemsize * (1 + with_entropy) + SAMPLES * 16
    assert payload < sum(sizes) < payload + 3 * 600


def test_statistics_are_masked_and_combined(tmp_path: Path) -> None:
    readers = []
    for seed in range(3):
        settings = replace(SETTINGS, reference_sha256=str(seed) * 64, with_entropy=seed < 2)
        readers.append(open_store(write_store(tmp_path / str(seed), settings, seed=seed)))
    batch = batch_of(2, 7)
    rows = torch.stack([losses(seed=seed)[[2, 7]] for seed in range(3)])
    for combine, expected in (("minimum", rows.min(0).values), ("mean", (rows[0] + rows[1] + rows[2]) / 3)):
        statistics = StoredScores(readers, combine)(batch)  # type: ignore[arg-type]
        torch.testing.assert_close(statistics.loss_N, (expected * batch.valid_bs).flatten())
        assert statistics.entropy_N is None, "one store has no entropies"
    both = StoredScores(readers[:2], "minimum")
    assert both.has_entropy
    entropy_N = both(batch).entropy_N
    expected = torch.minimum(losses(seed=100)[[2, 7]], losses(seed=101)[[2, 7]]) * batch.valid_bs
    assert entropy_N is not None
    assert torch.equal(entropy_N, expected.flatten())
    difference = StoredScores(readers[:2], "difference")(batch)
    first, second = (StoredScores([reader], "mean")(batch) for reader in readers[:2])
    assert torch.equal(difference.loss_N, first.loss_N - second.loss_N)
    one = StoredScores(readers[:1], "mean")(batch)
    assert torch.equal(one.loss_N, (losses()[[2, 7]] * batch.valid_bs).flatten()), "one store's losses keep their bits"


def changed(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip(at: int, bit: int = 0) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def test_every_flipped_byte_of_every_file_is_refused_at_start(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", replace(SETTINGS, with_entropy=True))
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 3 if path.name == MANIFEST else 7):
            path.write_bytes(flip(at, at % 8)(whole))
            with pytest.raises(ScoreStoreError, match=r"store"):
                open_store(folder)
        path.write_bytes(whole)
    open_store(folder)


def test_every_flipped_byte_is_found_by_reading_too(tmp_path: Path) -> None:
    """Where a store is so large that not every checksum is compared, what is wrong is still not trained on."""
    folder = write_store(tmp_path / "store", replace(SETTINGS, with_entropy=True))
    path = folder / shard_name(1)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(flip(at, at % 8)(whole))
        with pytest.raises(ScoreStoreError):
            open_store(folder, checksums=False).read(batch_of(4, 5, 6, 7))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
@pytest.mark.parametrize("name", [shard_name(0), shard_name(2), MANIFEST])
def test_a_truncated_file_is_refused(name: str, keep: int, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store")
    changed(folder, name, lambda content: content[:keep])
    with pytest.raises(ScoreStoreError, match=name):
        open_store(folder, checksums=False)  # sizes alone tell


def test_a_missing_shard_and_an_incomplete_store_are_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store")
    (folder / shard_name(1)).unlink()
    with pytest.raises(ScoreStoreError, match=rf"{shard_name(1)} is 'missing'"):
        open_store(folder)
    with pytest.raises(ScoreStoreError, match=r"2 shards.*complete, all 3"):
        open_store(write_store(tmp_path / "begun", upto=2))
    with pytest.raises(ScoreStoreError, match=r"hold a manifest\.json"):
        open_store(tmp_path / "nowhere")


def test_a_shard_of_another_store_or_place_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store")
    other = write_store(tmp_path / "other", replace(SETTINGS, reference_sha256="q" * 64), seed=1)
    for source in (other / shard_name(0), folder / shard_name(1)):
        changed(folder, shard_name(0), lambda _, source=source: source.read_bytes())
        with pytest.raises(ScoreStoreError, match=r"must be shard 0 of store"):
            open_store(folder, checksums=False).read(batch_of(0))
        with pytest.raises(ScoreStoreError, match=r"have the manifest's sha256"):
            open_store(folder)


def test_rows_in_each_others_place_are_refused_when_they_are_read(tmp_path: Path) -> None:
    """Two samples' losses exchanged together with their checksums: the sample's number is in the checksum."""
    folder = write_store(tmp_path / "store")
    path = folder / shard_name(0)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in ("loss", "score_digest"):
        tensors[name] = tensors[name][[1, 0, 2, 3]]
    save_file(tensors, path, metadata=metadata)
    reader = open_store(folder, checksums=False)
    reader.read(batch_of(2, 3))
    with pytest.raises(ScoreStoreError, match="scores of sample 1"):
        reader.read(batch_of(1))


def test_scores_of_other_tokens_are_refused_when_they_are_read(tmp_path: Path) -> None:
    reader = open_store(write_store(tmp_path / "store"))
    for position in (0, LENGTH):  # the first input, and the last label
        batch = batch_of(3, 6)
        (batch.tokens_bs if position == 0 else batch.labels_bs)[1, min(position, LENGTH - 1)] += 1
        with pytest.raises(ScoreStoreError, match="sample 6: tokens"):
            reader.read(batch)
    numbered_wrongly = batch_of(3)._replace(sample_b=torch.tensor([4]))
    with pytest.raises(ScoreStoreError, match="sample 4: tokens"):
        reader.read(numbered_wrongly)
    with pytest.raises(ScoreStoreError, match=r"samples is 10: must be more than 10, the number of a sample"):
        reader.read(batch_of(10))


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"sequence_length": 16}, r"--seq-length is 16: must be the run's, 8"),
    "split": ({"sequences": (0, 4)}, r"--split.* is \(0, 4\): must be the run's, \(0, 5\)"),
    "seed": ({"seed": 2}, r"--seed is 2: must be the run's, 1"),
    "corpus size": ({"corpus_bytes": 102}, r"--data-path \(size.* is 102: must be the run's, 100"),
    "corpus": ({"corpus_sha256": "d" * 64}, r"--data-path \(checksum.*dddd.*cccc"),
    "tokenizer": ({"tokenizer": "u" * 64}, r"--tokenizer-model.*uuuu.*tttt"),
    "epochs": ({"num_epochs": 3}, r"epochs.* is 3: must be the run's, 2"),
    "order": ({"sample_order": "p" * 64}, r"order of the samples.*pppp.*oooo"),
    "fewer samples": ({"num_samples": 9}, r"samples is 9: must be at least the run's, 10"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_scores_of_other_samples_are_refused_with_both_values(name: str, tmp_path: Path) -> None:
    change, pattern = DIFFERENT[name]
    folder = write_store(tmp_path / "store", replace(SETTINGS, data=replace(DATA, **change)), upto=0)
    with pytest.raises(ScoreStoreError, match=pattern):
        open_store(folder)


def test_more_samples_and_an_unknown_checksum_are_accepted(tmp_path: Path) -> None:
    check_data(tmp_path, replace(DATA, num_samples=11), replace(DATA, corpus_sha256=None))


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "reference": ({"reference_sha256": "s" * 64}, r"--reference-load.*rrrr.*ssss"),
    "precision": ({"computed_in": "bfloat16"}, r"--bf16.*'float32': must be this pass's, 'bfloat16'"),
    "dtype": ({"dtype": "float16"}, r"--score-dtype is 'float32'.*'float16'"),
    "entropy": ({"with_entropy": True}, r"--with-entropy is False.*True"),
    "samples": ({"data": replace(DATA, num_samples=12)}, r"samples.* is 10: .*12"),
    "seed": ({"data": replace(DATA, seed=3)}, r"--seed is 1: .*3"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_store_is_not_gone_on_with_under_other_settings(name: str, tmp_path: Path) -> None:
    change, pattern = OTHER_SETTINGS[name]
    folder = write_store(tmp_path / "store", upto=1)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ScoreStoreError, match=pattern):
        begin(folder, replace(SETTINGS, **change))
    assert (folder / MANIFEST).read_bytes() == before


def test_going_on_keeps_what_is_whole_and_nothing_else(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store")
    assert len(begin(folder, SETTINGS).shards) == 3
    (folder / f".{shard_name(2)}.tmp").write_bytes(b"half")
    changed(folder, shard_name(0), flip(-20 % (folder / shard_name(0)).stat().st_size))
    (folder / shard_name(2)).unlink()
    taken_up = begin(folder, replace(SETTINGS, samples_per_shard=5))
    assert list(taken_up.shards) == [shard_name(1)]
    assert taken_up.samples_per_shard == PER_SHARD, "shards are those the store was begun with"
    assert not list(folder.glob(".*"))
    write_store(folder)
    assert torch.equal(open_store(folder).read(batch_of(*range(SAMPLES))).loss_bs, losses())


def test_folders_that_are_no_stores_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ScoreStoreError, match=r"not notes\.txt"):
        begin(tmp_path, SETTINGS)
    with pytest.raises(ScoreStoreError, match="must be a folder that can be written"):
        begin(tmp_path / "notes.txt", SETTINGS)


@pytest.mark.parametrize(("dtype", "value"), [("float32", float("nan")), ("bfloat16", float("inf")), ("float16", 1e5)])
def test_a_loss_that_is_no_number_is_not_stored(dtype: Any, value: float, tmp_path: Path) -> None:
    manifest = begin(tmp_path / "store", replace(SETTINGS, dtype=dtype))
    loss = losses()[4:8]
    loss[2, 3] = value
    with pytest.raises(
        ScoreStoreError, match=f"loss of sample 6 is 'not finite': must be a number that {dtype} can hold"
    ):
        write_shard(tmp_path / "store", manifest, 1, Scores(loss, None), token_digests(batch_of(4, 5, 6, 7)))
    with pytest.raises(ScoreStoreError, match="--with-entropy"):
        write_shard(tmp_path / "store", replace(manifest, with_entropy=True), 0, Scores(loss * 0, None), [])
    assert [path.name for path in (tmp_path / "store").iterdir()] == [MANIFEST]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    manifest = begin(tmp_path / "store", SETTINGS)
    monkeypatch.setattr(store, "write_durably", full)
    with pytest.raises(ScoreStoreError, match="No space left"):
        write_shard(tmp_path / "store", manifest, 0, Scores(losses()[:4], None), token_digests(batch_of(0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda raw: {**raw, "format_version": 2}, r"format_version is 2: must be 1"),
        (lambda raw: {**raw, "data": {**raw["data"], "seed": 2}}, "have the checksum"),
        (lambda raw: [raw], "must be a JSON object"),
        (lambda raw: {k: v for k, v in raw.items() if k != "checksum"}, "checksum"),
    ],
    ids=["version", "edited", "list", "no checksum"],
)
def test_a_manifest_that_was_edited_is_refused(change: Any, pattern: str, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", upto=0)
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change(raw)))
    with pytest.raises(ScoreStoreError, match=pattern):
        StoreManifest.read(folder)


def test_a_manifest_with_other_fields_is_refused(tmp_path: Path) -> None:
    import hashlib

    folder = write_store(tmp_path / "store", upto=0)
    raw = json.loads((folder / MANIFEST).read_text())
    for broken in ({**raw, "more": 1}, {**raw, "data": {**raw["data"], "more": 1}}, {**raw, "data": 3}):
        broken.pop("checksum")
        canonical = json.dumps(broken, sort_keys=True).encode()
        (folder / MANIFEST).write_text(json.dumps({**broken, "checksum": hashlib.sha256(canonical).hexdigest()}))
        with pytest.raises(ScoreStoreError, match="must have the fields of this version"):
            StoreManifest.read(folder)


def test_large_stores_are_sampled_at_start_unless_asked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_store(tmp_path / "store")
    size = (folder / shard_name(0)).stat().st_size
    monkeypatch.setattr(store, "CHECKSUM_LIMIT_BYTES", 2 * size)  # of three: every second one fits
    changed(folder, shard_name(1), flip(size - 5))
    manifest = StoreManifest.read(folder)
    check_shards(folder, manifest, checksums=True)
    with pytest.raises(ScoreStoreError, match=shard_name(1)):
        check_shards(folder, manifest, checksums=True, whole=True)


def test_few_files_are_mapped_at_a_time(tmp_path: Path) -> None:
    data = replace(DATA, num_samples=40)
    folder = tmp_path / "store"
    manifest = begin(folder, replace(SETTINGS, data=data, samples_per_shard=1))
    entries = {
        shard_name(i): write_shard(folder, manifest, i, Scores(losses()[:1] + i, None), token_digests(batch_of(i)))
        for i in range(40)
    }
    manifest = manifest.with_shards(entries)
    reader = ScoreReader(folder, manifest)
    for i in range(40):
        assert torch.equal(reader.read(batch_of(i)).loss_bs, losses()[:1] + i)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line}
    assert 0 < len(mapped) <= 8


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 100, 5760, 10**7])
def test_shards_are_whole_micro_batches_and_bounded(num_samples: int, micro_batch_size: int) -> None:
    count = samples_per_shard(num_samples, 2048, micro_batch_size)
    assert count % micro_batch_size == 0
    assert count * 2048 < SHARD_TOKENS + micro_batch_size * 2048
    assert num_samples / count > 15 or num_samples < 64
