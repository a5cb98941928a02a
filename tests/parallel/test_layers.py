"""Tensor-parallel layers against dense ones: outputs, gradients, and what a rank-dependent mistake would do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_slm.checkpoint.weights import RandomWeights, fill_module
from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import LayoutError
from megatron_slm.parallel.groups import TensorParallel, create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import parts_of
from megatron_slm.parallel.topology import Topology
from tests.support.world import run_world

ARCH = Architecture(
    num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=4, kv_channels=2,
    vocab_size=13,
)  # fmt: skip


def make(layers: ParallelLayers) -> torch.nn.ModuleDict:
    modules = torch.nn.ModuleDict(
        {
            "embed": layers.embedding("model.embed_tokens", 13, 8),
            "up": layers.linear_in("model.mlp.", 8, {"gate_proj": 16, "up_proj": 16}, bias=True),
            "down": layers.linear_out("model.mlp.down_proj", 16, 8, bias=True),
        }
    )
    fill_module(modules, RandomWeights(ARCH, seed=3))
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if name.endswith("down.bias"):
                parameter.copy_(torch.arange(8.0) / 8)
    return modules


def outcome(tp: TensorParallel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    modules = make(ParallelLayers(tp, vocabulary_divisible_by=8))
    tokens_bs = torch.arange(12).view(2, 6)
    gate, up = modules["up"](modules["embed"](tokens_bs))
    out = modules["down"](torch.tanh(gate) * up)
    weight = torch.linspace(-1, 1, 6 * 2 * 8).view(6, 2, 8)
    if tp.sequence_parallel:
        weight = weight.chunk(tp.size)[tp.rank]
    (out * weight).sum().backward()
    if tp.sequence_parallel:
        gathered = [torch.empty_like(out) for _ in range(tp.size)]
        dist.all_gather(gathered, out.detach(), group=tp.group)
        out = torch.cat(gathered)
    gradients = {name: p.grad for name, p in modules.named_parameters()}
    return out.detach(), gradients


def rank_main(sequence_parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=2), sequence_parallel=sequence_parallel)
    return *outcome(tp), tp.rank


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_equal_dense_ones(sequence_parallel: bool) -> None:
    dense, dense_gradients = outcome(TensorParallel())
    for out, gradients, rank in run_world(rank_main, 2, sequence_parallel):
        assert torch.allclose(out, dense, atol=1e-6)
        half = slice(8 * rank, 8 * rank + 8)
        gate, up = dense_gradients["up.weight"].chunk(2)
        assert torch.allclose(gradients["up.weight"], torch.cat([gate[half], up[half]]), atol=1e-6)
        assert torch.allclose(gradients["down.weight"], dense_gradients["down.weight"][:, half], atol=1e-6)
        assert torch.allclose(gradients["down.bias"], dense_gradients["down.bias"], atol=1e-6)
        assert torch.allclose(gradients["embed.weight"], dense_gradients["embed.weight"][half], atol=1e-6)


def test_vocabulary_padding_is_zero_and_gets_no_gradient() -> None:
    modules = make(ParallelLayers(vocabulary_divisible_by=8))
    embed = modules["embed"]
    assert embed.weight.shape == (16, 8)
    assert (embed.weight[13:] == 0).all()
    assert embed.tokens().shape == (13, 8)


@pytest.mark.parametrize(("rank", "rows"), [(0, 4), (1, 4), (2, 4), (3, 1)])
def test_the_last_ranks_hold_fewer_tokens(rank: int, rows: int) -> None:
    layer = ParallelLayers(TensorParallel(size=4, rank=rank), vocabulary_divisible_by=8).embedding("e", 13, 8)
    assert layer.length == rows
    (part,) = parts_of(layer.weight)
    assert part.shape == (13, 8)
    assert part.length == rows


def test_shards_are_marked_for_deepspeeds_norms() -> None:
    layers = ParallelLayers(TensorParallel(size=2))
    assert layers.linear_in("x.", 8, {"a": 4}).weight.tensor_model_parallel
    assert layers.linear_out("x", 8, 4).weight.tensor_model_parallel
    assert not hasattr(layers.replicated("norm.weight", (8,)), "tensor_model_parallel")


def test_widths_that_cannot_be_cut_are_refused() -> None:
    layers = ParallelLayers(TensorParallel(size=4), vocabulary_divisible_by=2)
    with pytest.raises(LayoutError, match=r"x.a is 6: must be divisible by --tensor-model-parallel-size \(4\)"):
        layers.linear_in("x.", 8, {"a": 6})
    with pytest.raises(LayoutError, match="padded vocabulary is 14"):
        layers.embedding("e", 13, 8)
