"""Whatever happens to a checkpoint's files, it is named before anything is trained on it, or it is harmless."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint import format as checkpoint_format
from megatron_slm.checkpoint.format import Manifest, find_checkpoint
from megatron_slm.checkpoint.load import CheckpointSource, load_state
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import CheckpointError
from megatron_slm.flags.load import parse
from megatron_slm.run.resume import Resume, open_resume
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, reported_error, run_world

SAVED = "run/checkpoints"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages with checkpoints of steps 2 and 4, which hold every kind of file but a tokenizer."""
    folder = tmp_path_factory.mktemp("damage")
    write_corpus(folder / "corpus")
    save_hf_llama(folder / "reference")
    run_world(train_and_report, 2, values(folder, train_iters=4))
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "objective": "slm", "reference_load": folder / "reference", "slm_probe_interval": 2, "save_interval": 2,
        "pipeline_model_parallel_size": 2, "lr_decay_iters": 6, "train_iters": 6,
    }  # fmt: skip
    return run_flags(folder / "corpus", folder / "run", **{**common, **changes})


@cache
def parsed() -> RunConfig:
    return parse(flags(values(Path("anywhere"))))[0]


def opened(folder: Path, load: str = SAVED, **changes: Any) -> Resume | None:
    config = parsed()
    checkpoint = replace(config.checkpoint, load=str(folder / load), **changes)
    return open_resume(replace(config, checkpoint=checkpoint))


def contents(checkpoint: Path) -> dict[str, str]:
    files = Manifest.read(checkpoint).files
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in files}


def damage(checkpoint: Path, generator: random.Random) -> str:
    """Flip a bit of a random file, or cut it off; what was done, in words."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = generator.choice([*files, checkpoint.parent / "latest"])
    raw = bytearray(path.read_bytes())
    place = generator.randrange(len(raw))
    if generator.random() < 0.3:
        path.write_bytes(raw[:place])
        return f"{path.name} cut to {place} bytes"
    if generator.random() < 0.5:
        place = min(place, generator.randrange(1000)) if len(raw) > 1000 else place  # the header, more often
    raw[place] ^= 1 << generator.randrange(8)
    path.write_bytes(raw)
    return f"a bit of byte {place} of {path.name}"


def test_two_hundred_flips_and_truncations_are_named_or_harmless(run: Path, tmp_path: Path) -> None:
    generator, named, harmless = random.Random(200), 0, 0
    original = Manifest.read(run / SAVED / "step_00000004")
    before = contents(run / SAVED / "step_00000004")
    for number in range(200):
        shutil.copytree(run / SAVED, tmp_path / str(number) / SAVED)
        checkpoint = tmp_path / str(number) / SAVED / "step_00000004"
        what = damage(checkpoint, generator)
        resume, said = None, ""
        try:
            resume = opened(tmp_path / str(number))
        except CheckpointError as error:
            named, said = named + 1, str(error)
        if said:
            assert re.search("step_00000004|checkpoint format", said), what
            assert "--load-fallback" in said
        else:
            harmless += 1
            assert resume is not None
            assert resume.folder == checkpoint, what
            assert resume.manifest == original, what
            assert contents(checkpoint) == before, what
        shutil.rmtree(tmp_path / str(number))
    assert named + harmless == 200
    assert named > 150


def test_what_is_read_without_checksums_fails_by_name_too(run: Path, tmp_path: Path) -> None:
    """Damage to what a file says of itself (its header) shows even so; damage to numbers cannot."""
    generator, shapes = random.Random(7), CheckpointSource(run / SAVED / "step_00000004").shapes()
    for number in range(100):
        shutil.copytree(run / SAVED, tmp_path / str(number) / SAVED)
        damage(tmp_path / str(number) / SAVED / "step_00000004", generator)
        try:
            resume = opened(tmp_path / str(number), load_checksums="none")
            assert resume is not None
            source = CheckpointSource(resume.folder)
            assert source.shapes() == shapes
            for name in shapes:
                for quantity in ("weight", "exp_avg", "exp_avg_sq"):
                    source.whole(name, quantity)
            load_state(resume.folder, resume.manifest)
        except CheckpointError:
            pass
        shutil.rmtree(tmp_path / str(number))


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_checksums_of_large_files_are_compared_on_request(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_slm.run import resume

    shutil.copytree(run / SAVED, tmp_path / SAVED)
    flip_last_byte(tmp_path / SAVED / "step_00000004" / "optimizer_00001.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer_00001.*match its checksum"):
        opened(tmp_path)
    monkeypatch.setattr(resume, "CHECKSUM_LIMIT_BYTES", 10_000)
    assert opened(tmp_path) is not None
    assert opened(tmp_path, load_checksums="none") is not None
    with pytest.raises(CheckpointError, match=r"optimizer_00001.*match its checksum"):
        opened(tmp_path, load_checksums="all")
    assert checkpoint_format.CHECKSUM_LIMIT_BYTES == 256 * 2**20


def test_a_damaged_newest_is_named_and_the_one_before_taken_only_on_request(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / SAVED, tmp_path / "saved")
    flip_last_byte(tmp_path / "saved" / "step_00000004" / "weights_00001.safetensors")
    common = {"load": tmp_path / "saved", "save": tmp_path / "saved", "run_dir": tmp_path / "run"}
    again = {**values(run, **{k: v for k, v in common.items() if k != "run_dir"}), "run-dir": tmp_path / "run"}
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags(again))
    error = reported_error(failed.value)
    assert "step_00000004/weights_00001.safetensors" in error
    assert "--load-fallback (the one before is step_00000002)" in error

    whole = run_world(
        train_and_report, 2, {**values(run), "run-dir": tmp_path / "straight", "save": tmp_path / "other"}
    )
    resumed = run_world(train_and_report, 2, {**again, "load-fallback": True})
    for one, other in zip(whole, resumed, strict=True):
        for a, b in zip(one["parameters"], other["parameters"], strict=True):
            assert (a == b).all()
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == [
        "latest", "step_00000002", "step_00000004", "step_00000004.damaged", "step_00000006",
    ]  # fmt: skip
    made_again, before = (contents(folder / "step_00000004") for folder in (tmp_path / "saved", run / SAVED))
    assert made_again.pop("config.yaml") != before.pop("config.yaml")
    assert made_again == before
    assert find_checkpoint(tmp_path / "saved").name == "step_00000006"


def test_no_fallback_where_all_are_damaged_or_one_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / SAVED, tmp_path / SAVED)
    flip_last_byte(tmp_path / SAVED / "step_00000004" / "config.yaml")
    with pytest.raises(CheckpointError, match="step_00000004"):
        opened(tmp_path, f"{SAVED}/step_00000004", load_fallback=True)
    flip_last_byte(tmp_path / SAVED / "step_00000002" / "config.yaml")
    with pytest.raises(CheckpointError, match="step_00000002"):
        opened(tmp_path, load_fallback=True)


def test_a_folder_without_a_manifest_is_passed_over(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run / SAVED, tmp_path / SAVED)
    (tmp_path / SAVED / "step_00000004" / "manifest.json").unlink()
    resume = opened(tmp_path)
    assert resume is not None
    assert resume.folder.name == "step_00000002"
    assert "step_00000004: incomplete, without manifest.json" in caplog.text
    with pytest.raises(CheckpointError, match=r"contain a manifest\.json"):
        opened(tmp_path, f"{SAVED}/step_00000004")
