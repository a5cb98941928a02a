"""Files of our own writing, read by the safetensors library."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_slm.checkpoint import tensor_file
from megatron_slm.checkpoint.tensor_file import write_tensor_file

DTYPES = (torch.uint8, torch.float32, torch.bool, torch.bfloat16, torch.float64, torch.int64, torch.float16)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{i}.{dtype}": (torch.randn(3 + i, 5) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"view": torch.arange(90.0)[7:30], "columns": torch.randn(6, 4)[:, 1:3], "none": torch.empty(0)}
    path = tmp_path / "x.safetensors"
    entry = write_tensor_file(path, tensors, {"pieces": '[{"name": "ä"}]'})
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    assert entry == {
        "size": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "header": {"size": len(header), "sha256": hashlib.sha256(header).hexdigest()},
    }
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"pieces": '[{"name": "ä"}]'}


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(1000), "b": torch.randn(17).to(torch.bfloat16)}
    whole = write_tensor_file(tmp_path / "a", tensors, {})
    monkeypatch.setattr(tensor_file, "_BLOCK_BYTES", 7)
    assert write_tensor_file(tmp_path / "b", tensors, {}) == whole
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_tensor_file(tmp_path / "x", {"a": torch.zeros(3)}, {})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_tensor_file(Path("/dev/full"), {"a": torch.zeros(100_000)}, {})
