from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_slm.checkpoint.format import (
    MANIFEST,
    Manifest,
    checkpoint_folders,
    file_entry,
    find_checkpoint,
    folder_name,
    step_of,
    verify_files,
)
from megatron_slm.checkpoint.state import RunState
from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import CheckpointError
from megatron_slm.files import write_durably

ARCH = Architecture(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, kv_channels=4, vocab_size=9
)  # fmt: skip


def write(folder: Path, step: int) -> Path:
    target = folder / folder_name(step)
    target.mkdir(parents=True)
    (target / "weights_00000.safetensors").write_bytes(b"weights" * step)
    Manifest(
        state=RunState(step=step, consumed_samples=step * 8, adam_step=step), architecture=ARCH, layout={"pipeline": 1},
        tokenizer_fingerprint=None, sample_order=None, files={"weights_00000.safetensors": file_entry(target / "weights_00000.safetensors")},
    ).write(target)  # fmt: skip
    return target


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.state.consumed_samples, manifest.architecture) == (3, 24, ARCH)
    verify_files(folder, manifest)


def test_a_threshold_reads_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    manifest = Manifest.read(folder)
    assert manifest.state.score_threshold is None
    manifest.state.score_threshold = 0.1 + 0.2
    manifest.write(folder)
    assert Manifest.read(folder).state.score_threshold == 0.1 + 0.2


def test_the_newest_complete_one_is_found_whatever_latest_says(tmp_path: Path) -> None:
    write(tmp_path, 9)
    write(tmp_path, 10)
    (tmp_path / folder_name(11)).mkdir()  # no manifest
    (tmp_path / ".step_00000012.tmp").mkdir()
    (tmp_path / ".step_00000012.tmp" / MANIFEST).write_text("{}")
    write_durably(tmp_path / "latest", b"step_00000011")
    assert find_checkpoint(tmp_path).name == "step_00000010"
    assert find_checkpoint(tmp_path / "step_00000009").name == "step_00000009"


def test_no_complete_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / folder_name(11)).mkdir()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="contain a complete checkpoint"):
            find_checkpoint(path)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    manifest = Manifest.read(folder)
    path = folder / "weights_00000.safetensors"
    path.write_bytes(b"Weights" * 5)
    with pytest.raises(CheckpointError, match=r"match its checksum in manifest\.json"):
        verify_files(folder, manifest)
    verify_files(folder, manifest, checksums=False)
    path.write_bytes(b"weights" * 4)
    with pytest.raises(CheckpointError, match="'28 bytes': must be 35 bytes long"):
        verify_files(folder, manifest, checksums=False)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_files(folder, manifest)


def test_a_file_that_no_manifest_lists_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / "weights_00007.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"weights_00007.*must be listed in manifest\.json"):
        verify_files(folder, Manifest.read(folder))


def test_shares_of_the_checksums_cover_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    names = [f"weights_{number:05d}.safetensors" for number in range(5)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(b"x" * (number + 1))
    manifest = dataclasses.replace(Manifest.read(folder), files={name: file_entry(folder / name) for name in names})
    for number, name in enumerate(names):
        (folder / name).write_bytes(b"y" * (number + 1))
        found = 0
        for rank in range(3):
            try:
                verify_files(folder, manifest, share=(rank, 3))
            except CheckpointError:
                found += 1
        assert found == 1
        verify_files(folder, manifest, limit_bytes=number)  # larger than the limit: not compared
        (folder / name).write_bytes(b"x" * (number + 1))


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 7):
        write(tmp_path, step) if step == 7 else (tmp_path / folder_name(step)).mkdir()
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [7, 99_999_999, 100_000_000]
    assert find_checkpoint(tmp_path).name == folder_name(7)


def test_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, format_version=99).write(folder)
    with pytest.raises(CheckpointError, match="checkpoint format is 99"):
        Manifest.read(folder)
    manifest.write(folder)
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({key: raw[key] for key in raw if key != "manifest_sha256"}))
    with pytest.raises(CheckpointError, match="match its own checksum"):
        Manifest.read(folder)
    (folder / MANIFEST).write_text(json.dumps({**raw, "consumed_samples": 41}))
    with pytest.raises(CheckpointError, match="match its own checksum"):
        Manifest.read(folder)
    (folder / MANIFEST).write_text(json.dumps(raw, indent=3))
    assert Manifest.read(folder) == manifest, "white space is no damage"
    (folder / MANIFEST).write_text('{"step"')
    with pytest.raises(CheckpointError, match="be valid JSON"):
        Manifest.read(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"contain a manifest\.json"):
        Manifest.read(folder)
