"""The state of a run: all of it survives a save, and its file is the one that earlier versions wrote and read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.checkpoint import format as format_module
from megatron_slm.checkpoint import save
from megatron_slm.checkpoint.format import MANIFEST, Manifest
from megatron_slm.checkpoint.load import load_state
from megatron_slm.checkpoint.state import RunState
from megatron_slm.loss.sums import LossSums
from tests.checkpoint.test_format import ARCH
from tests.checkpoint.test_save import OPTIMIZER, saver

OF_AN_EARLIER_VERSION = """{"step": 7, "consumed_samples": 56, "adam_step": 6, "architecture": {"num_layers": 1,
"hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 4,
"vocab_size": 9, "max_position_embeddings": 2048, "norm_epsilon": 1e-05, "rotary_base": 10000.0, "rope_scaling": {},
"tied": false, "qkv_bias": false, "attention_output_bias": false, "mlp_bias": false, "qk_norm": false,
"sliding_window": null, "full_attention_layers": 0, "initializer_range": 0.02}, "layout": {"pipeline": 1},
"tokenizer_fingerprint": "abc", "sample_order": "def", "files": {}, "score_threshold": 0.25, "tokens_seen": 900,
"tokens_kept": 540, "recent_losses": [3.5, 3.25], "data": {"consumed": {"corpus": 56}}, "versions": {"torch": "2.9"},
"format_version": 2, "manifest_sha256": "1d60b66e68646b85b9b9956a3fdfbf07d57cfd7d841635a84f016c0dc4ca0196"}"""
"""Written by version 0.1.0 before there was a `RunState`."""

EXAMPLES: dict[str, Any] = {
    "int": 41, "int | None": 42, "float": 0.1 + 0.2, "float | None": 0.1 + 0.2, "bool": True, "str": "word",
    "list[float]": [0.1, 2.5], "list[int]": [3, 5], "dict[str, Any]": {"a": [1, {"b": None}]}, "dict[str, float]": {"a": 1.5},
    "Tensor | None": torch.tensor([[True, False], [False, True]]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def world_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    monkeypatch.setattr(save, "rank_files", lambda *args, **kwargs: [])
    yield
    dist.destroy_process_group()


def different_from_default(kind: type[RunState]) -> RunState:
    """A state whose every field has another value than its default."""
    values = {f.name: EXAMPLES[str(f.type)] for f in dataclasses.fields(kind)}
    for name, value in values.items():
        assert type(value) is torch.Tensor or value != getattr(kind(), name)
    return kind(**values)


def saved_and_loaded(state: RunState, folder: Path) -> RunState:
    saved = saver(folder, asynchronous=False).save(OPTIMIZER, state)
    assert saved is not None
    return load_state(saved.folder, Manifest.read(saved.folder))


def assert_equal(one: RunState, other: RunState) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_every_field_survives_a_save(tmp_path: Path) -> None:
    state = different_from_default(RunState)
    assert_equal(saved_and_loaded(state, tmp_path / "saved"), state)
    assert_equal(saved_and_loaded(RunState(), tmp_path / "new"), RunState())


@dataclasses.dataclass(kw_only=True)
class Extended(RunState):
    """A state with one more field, which no other module names."""

    controller: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_a_new_field_is_saved_and_loaded_by_its_declaration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_and_loaded(RunState(step=3), tmp_path / "saved")
    monkeypatch.setattr(format_module, "RunState", Extended)
    state = different_from_default(Extended)
    assert_equal(saved_and_loaded(state, tmp_path / "saved"), state)
    before = Manifest.read(tmp_path / "saved" / "step_00000003").state
    assert_equal(before, Extended(step=3))


def test_a_loaded_state_is_a_copy(tmp_path: Path) -> None:
    saved = saver(tmp_path, asynchronous=False).save(OPTIMIZER, RunState(recent_losses=[1.0]))
    assert saved is not None
    manifest = Manifest.read(saved.folder)
    load_state(saved.folder, manifest).recent_losses.append(2.0)
    assert manifest.state.recent_losses == [1.0]


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(OF_AN_EARLIER_VERSION)
    manifest = Manifest.read(tmp_path)
    assert manifest.state == RunState(
        step=7, consumed_samples=56, adam_step=6, score_threshold=0.25, tokens_seen=900, tokens_kept=540,
        recent_losses=[3.5, 3.25],
    )  # fmt: skip
    assert (manifest.step, manifest.architecture, manifest.data) == (7, ARCH, {"consumed": {"corpus": 56}})


def test_an_earlier_version_can_read_a_manifest(tmp_path: Path) -> None:
    """The same values under the same names, beside each other, and the same checksum."""
    (tmp_path / MANIFEST).write_text(OF_AN_EARLIER_VERSION)
    Manifest.read(tmp_path).write(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text()) == json.loads(OF_AN_EARLIER_VERSION)


def test_a_step_moves_the_state() -> None:
    state = RunState(tokens_seen=100, tokens_kept=60)
    state.advance(8, LossSums(valid_tokens=20.0, kept_tokens=12.0))
    state.advance(8, None)
    assert state == RunState(step=2, consumed_samples=16, adam_step=1, tokens_seen=120, tokens_kept=72)
    assert state.skipped_steps == 1
    uncounted = RunState(tokens_seen=None, tokens_kept=None)
    uncounted.advance(8, LossSums(valid_tokens=20.0))
    assert uncounted.tokens_seen is None
