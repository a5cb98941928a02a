"""Reading logical tensors from pieces that were cut another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.checkpoint import load, weights
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.slices import TABLE, Slice, slices_in, slices_in_headers
from megatron_slm.checkpoint.weights import Quantity, RandomWeights, read_range
from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import Part, cut_range, parts_with_offsets

WHOLE = torch.arange(12.0 * 8).view(12, 8)


def part(dim: int | None, size: int, rank: int) -> Part:
    length = 0 if dim is None else WHOLE.shape[dim] // size
    return Part(name="w", shape=(12, 8), dim=dim, start=rank * length, length=length)


def write(folder: Path, dim: int | None, size: int, data_ranks: int) -> None:
    """One file for every (tensor rank, data rank), the flattened slice cut evenly over the data ranks."""
    for rank in range(size if dim is not None else 1):
        held = part(dim, size, rank)
        flat = cut_range(WHOLE, held, 0, held.numel)
        step = -(-held.numel // data_ranks)
        for data_rank in range(data_ranks):
            begin, end = min(data_rank * step, held.numel), min((data_rank + 1) * step, held.numel)
            described = [{"name": "w", "shape": [12, 8], "dim": dim, "start": held.start, "length": held.length,
                          "begin": begin, "end": end}]  # fmt: skip
            number = f"{rank * data_ranks + data_rank:05d}"
            save_file({"0.weight": flat[begin:end].clone()}, folder / f"weights_{number}.safetensors",
                      metadata={"pieces": json.dumps(described)})  # fmt: skip
            save_file({"0.exp_avg": -flat[begin:end]}, folder / f"optimizer_{number}.safetensors")


layouts = st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from([1, 2, 4]))


@settings(max_examples=60, deadline=None)
@given(wrote=layouts, reads=layouts, data_ranks=st.integers(1, 5), random=st.randoms())
def test_any_cut_reads_any_other(tmp_path_factory, wrote, reads, data_ranks, random) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    write(folder, *wrote, data_ranks)
    source = CheckpointSource(folder)
    assert torch.equal(source.whole("w"), WHOLE)
    assert source.shapes() == {"w": (12, 8)}
    wanted = part(*reads, random.randrange(reads[1]) if reads[0] is not None else 0)
    begin = random.randrange(wanted.numel)
    end = random.randrange(begin, wanted.numel) + 1
    assert torch.equal(source.read("weight", wanted, begin, end), cut_range(WHOLE, wanted, begin, end))
    assert torch.equal(source.read("exp_avg", wanted, begin, end), -cut_range(WHOLE, wanted, begin, end))


@pytest.mark.parametrize(
    ("wrote", "reads"), [((1, 4), (1, 2)), ((0, 4), (0, 2)), ((None, 1), (1, 4)), ((1, 4), (0, 2))]
)
def test_another_layout_reads_no_more_than_overlaps(
    wrote: tuple[int | None, int], reads: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice by columns lies in whole rows of a file, and is read by blocks of them."""
    write(tmp_path, *wrote, data_ranks=1)
    source = CheckpointSource(tmp_path)
    monkeypatch.setattr(load, "BLOCK_ELEMENTS", 16)
    read: list[int] = []
    real = CheckpointSource._tensor

    def counting(self: CheckpointSource, slice_: Slice, quantity: Quantity, begin: int, end: int) -> torch.Tensor:
        read.append(end - begin)
        return real(self, slice_, quantity, begin, end)

    monkeypatch.setattr(CheckpointSource, "_tensor", counting)
    wanted = part(*reads, 0)
    assert torch.equal(source.read("weight", wanted, 0, wanted.numel), cut_range(WHOLE, wanted, 0, wanted.numel))
    assert sum(read) == (WHOLE.numel() if wrote[0] is None else wanted.numel)
    assert max(read) <= 16


def test_tables_of_the_manifest_are_those_of_the_headers(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 3)
    headers = slices_in_headers(tmp_path)
    files: dict[str, dict[str, Any]] = {}
    for path in tmp_path.glob("weights_*.safetensors"):
        with safe_open(path, framework="pt") as file:
            files[path.name] = {TABLE: json.loads(file.metadata()[TABLE])}
        path.unlink()
    assert slices_in(tmp_path, files) == headers


def test_a_file_without_slices_is_not_opened_for_its_table(tmp_path: Path) -> None:
    assert slices_in(tmp_path, {"weights_00000.safetensors": {TABLE: []}}) == {}  # the file does not even exist


def test_a_missing_piece_is_never_filled_in(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 2)
    (tmp_path / "weights_00001.safetensors").unlink()
    source = CheckpointSource(tmp_path)
    with pytest.raises(CheckpointError, match="contain all of w"):
        source.whole("w")
    with pytest.raises(CheckpointError, match="contain all of w"):
        source.read("weight", part(0, 2, 0), 0, 48)


def test_other_names_and_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 1)
    source = CheckpointSource(tmp_path)
    with pytest.raises(CheckpointError, match="contain v"):
        source.read("weight", Part(name="v", shape=(2,)), 0, 2)
    with pytest.raises(CheckpointError, match=r"must be \(12, 4\)"):
        source.read("weight", Part(name="w", shape=(12, 4)), 0, 2)


def test_a_parameter_of_several_parts_reads_across_their_borders() -> None:
    arch = Architecture(num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=2, num_query_groups=2,
                        kv_channels=2, vocab_size=5)  # fmt: skip
    source = RandomWeights(arch, seed=0)
    layer = ParallelLayers(TensorParallel(size=2, rank=1)).linear_in("m.", 4, {"a": 4, "b": 6})
    whole = read_range(layer.weight, source, "weight", 0, layer.weight.numel())
    names = [(p.name, offset) for p, offset in parts_with_offsets(layer.weight)]
    assert names == [("m.a.weight", 0), ("m.b.weight", 8)]
    for begin, end in ((0, 20), (3, 11), (7, 9), (8, 20)):
        assert torch.equal(read_range(layer.weight, source, "weight", begin, end), whole[begin:end])
    padded = ParallelLayers(vocabulary_divisible_by=8).embedding("e", 5, 4).weight
    values = read_range(padded, source, "weight", 0, padded.numel())
    assert (values[20:] == 0).all()
    assert (values[:20] != 0).all()


def test_weights_pass_through_the_host_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture(num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=2, num_query_groups=2,
                        kv_channels=2, vocab_size=5)  # fmt: skip
    source = RandomWeights(arch, seed=0)
    layer = ParallelLayers(TensorParallel(size=2, rank=1)).linear_in("m.", 4, {"a": 4, "b": 6})
    sizes, real = [], weights.read_range

    def counted(*args: Any) -> Tensor:
        sizes.append(args[4] - args[3])
        return real(*args)

    monkeypatch.setattr(weights, "READ_ELEMENTS", 6)
    monkeypatch.setattr(weights, "read_range", counted)
    target = torch.full((17,), torch.nan, dtype=torch.bfloat16)
    weights.copy_range(target, layer.weight, source, "weight", 2, 19)
    assert sizes == [6, 6, 5]
    assert torch.equal(target, read_range(layer.weight, source, "weight", 2, 19).bfloat16())


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_slice_that_no_file_holds_is_an_error(tmp_path: Path, dim: int, missing: int) -> None:
    write(tmp_path, dim, size=2, data_ranks=1)
    (tmp_path / f"weights_{missing:05d}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="contain all of w"):
        CheckpointSource(tmp_path).whole("w")
