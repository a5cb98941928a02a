"""A checkpoint of format 2, the former one, resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_slm.checkpoint.format import MANIFEST, Manifest, _content_sha256, complete_checkpoints
from megatron_slm.checkpoint.slices import TABLE
from megatron_slm.checkpoint.snapshot import RNG_CPU
from megatron_slm.checkpoint.tensor_file import write_tensor_file
from tests.support.runs import run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

RANDOM_STATE = torch.Generator().manual_seed(7).get_state()


def to_format_2(checkpoint: Path) -> None:
    """Rewrite a checkpoint as version 0.2 wrote it: random states in files of their own, no slices in the manifest.

    The random states are others than those the run would have anyway.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest.pop("manifest_sha256")
    assert manifest["format_version"] == 3
    manifest["format_version"] = 2
    for path in sorted(checkpoint.glob("weights_*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        assert not torch.equal(tensors.pop(RNG_CPU), RANDOM_STATE)
        states = {"cpu": RANDOM_STATE}
        rng = path.name.replace("weights_", "rng_")
        manifest["files"][path.name] = write_tensor_file(path, tensors, metadata)
        manifest["files"][rng] = write_tensor_file(checkpoint / rng, states, {})
    assert not any(TABLE in entry for entry in manifest["files"].values())
    manifest["files"] = dict(sorted(manifest["files"].items()))
    manifest["manifest_sha256"] = _content_sha256(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1))


def test_a_checkpoint_of_format_2_resumes_to_the_bit(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    save_hf_llama(tmp_path / "reference")
    values = {
        "objective": "slm", "reference_load": tmp_path / "reference", "pipeline_model_parallel_size": 2,
        "save_interval": 2, "train_iters": 4,
    }  # fmt: skip
    run_world(train_and_report, 2, run_flags(tmp_path / "corpus", tmp_path / "run", **values))
    former, straight = complete_checkpoints(tmp_path / "run" / "checkpoints")
    to_format_2(former)
    assert Manifest.read(former).format_version == 2
    run_world(train_and_report, 2, run_flags(tmp_path / "corpus", tmp_path / "again", **values, load=former))
    (again,) = complete_checkpoints(tmp_path / "again" / "checkpoints")
    expected, found = Manifest.read(straight), Manifest.read(again)
    assert found.format_version == 3
    assert found.state == expected.state
    weights = sorted(name for name in expected.files if name.endswith(".safetensors"))
    assert len(weights) == 4, "weights and moments of two ranks"
    for name in weights:
        theirs, ours = (load_file(folder / name) for folder in (straight, again))
        if name.startswith("weights_"):
            assert torch.equal(ours.pop(RNG_CPU), RANDOM_STATE), "this run draws no random numbers"
            del theirs[RNG_CPU]
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[tensor], ours[tensor]) for tensor in theirs), name
