"""Files written and read in small blocks are the files that are written and read whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.tensor_file import Entry, write_entries
from megatron_slm.convert import tensors
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.writer import plan_shards
from megatron_slm.files import file_sha256
from tests.support.families import save_family
from tests.support.runs import run_flags, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world


def test_a_file_is_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = {
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "norm": torch.randn(7, generator=generator),
        "other": torch.randn(4, 2, generator=generator).half(),
    }
    entries = [Entry(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in whole.items()]

    def blocks(entry: Entry) -> Iterator[Tensor]:
        return iter(whole[entry.name].split(2))

    path = tmp_path / "file.safetensors"
    listed = write_entries(path, entries, blocks, {"format": "pt"})
    assert (listed["size"], listed["sha256"]) == (path.stat().st_size, file_sha256(path))
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], whole[name]) and loaded[name].dtype == whole[name].dtype for name in whole)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert next(iter(file.offset_keys())) == "norm", "wider numbers come first, so that all are aligned"
    with pytest.raises(AssertionError, match="whole"):
        write_entries(path, entries, lambda entry: list(blocks(entry))[:1], {})


def test_shards_are_as_large_as_they_may_be() -> None:
    entries = [Entry(name=str(n), shape=(n,), dtype=torch.float16) for n in (3, 3, 9, 1, 1, 1)]
    assert [[e.name for e in shard] for shard in plan_shards(entries, 8)] == [["3"], ["3"], ["9"], ["1", "1", "1"]]
    assert len(plan_shards(entries, 10**9)) == 1


def test_blocks_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a checkpoint whose tensors lie in pieces, cut along rows, along columns and by ZeRO."""
    hf = save_family("qwen2.5 with a window", tmp_path / "hf", dtype=torch.bfloat16)
    layout = {"tensor_model_parallel_size": 2, "init_from": hf, "train_iters": 1, "save_interval": 1}
    shape = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "init_method_std",
    )
    flags = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", **layout, **dict.fromkeys(shape))
    run_world(train_and_report, 4, flags)
    trained = str(tmp_path / "run" / "checkpoints")
    asked: list[int] = []
    real = CheckpointSource.rows

    def counted(self: CheckpointSource, name: str, start: int, stop: int) -> Tensor:
        block = real(self, name, start, stop)
        asked.append(block.numel() * block.element_size())
        return block

    monkeypatch.setattr(CheckpointSource, "rows", counted)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 200)
    import_folder(str(hf), str(tmp_path / "ours"))
    out = export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "out")).folder
    before, after = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    after = load_file(export_checkpoint(trained, str(tmp_path / "trained")).folder / "model.safetensors")
    source = CheckpointSource(next(Path(trained).glob("step_*")))
    assert all(torch.equal(after[name], source.whole(name)) for name in after)
    assert max(asked) <= 200, "of no tensor more than a block was in memory"
