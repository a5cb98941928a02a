"""A reference whose weights the data-parallel ranks share: what each of them holds, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.weights import RandomWeights
from megatron_slm.config.architecture import Architecture
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.groups import DataParallel, TensorParallel, create_data_parallel_group, init_distributed
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.frozen import FrozenStage, build_reference
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch
from tests.support.world import run_world

ARCH = Architecture(
    num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=2, kv_channels=4,
    vocab_size=13,
)  # fmt: skip
TOKENS = torch.arange(12).view(2, 6)


def gathered(reference: FrozenStage) -> list[int]:
    """Numbers of the layers whose weights are all here."""
    assert reference.shared is not None
    held = [number for number, shared in enumerate(reference.shared._shared) if shared._gathered is not None]
    finite = [i for i, layer in enumerate(reference.layers) if all(p.isfinite().all() for p in layer.parameters())]
    assert set(finite) <= set(held), "without their weights, layers have none that could be mistaken for some"
    return held


def inspect(tied: bool, vocab_size: int) -> dict[str, Any]:
    init_distributed()
    topology = Topology(data=3)
    arch, layers = replace(ARCH, tied=tied, vocab_size=vocab_size), ParallelLayers(vocabulary_divisible_by=8)
    source = RandomWeights(arch, seed=5)
    whole = build_reference(arch, source, topology, layers, torch.float32)
    dp = create_data_parallel_group(topology)
    shared = build_reference(arch, source, topology, layers, torch.float32, shared_by=dp)
    assert shared.shared is not None
    at_rest, seen = gathered(shared), []
    for layer in shared.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(gathered(shared)))
    hidden = shared(TOKENS)
    weight = shared.output_weight()
    same = torch.equal(hidden, whole(TOKENS)) and torch.equal(weight.weight_Vd, whole.output_weight().weight_Vd)
    after = gathered(shared)
    objective = Objective(selector=Selector(scores=(SCORES["excess"],)), tp=TensorParallel(), dp=DataParallel())
    batch = MicroBatch(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))
    losses = [of.statistics(of(TOKENS), objective, batch).loss_N for of in (shared, whole)]
    return {
        "same": same and torch.equal(*losses),
        "finite": bool(hidden.isfinite().all() and weight.weight_Vd.isfinite().all()),
        "gathered": [at_rest, *seen[:5], after, gathered(shared)],
        "held": sum(layer._share.numel() for layer in shared.shared._shared),
        "shares": sum(ceil_div(sum(p.numel() for p in layer.parameters()), 3) for layer in whole.layers),
        "gradients": any(p.requires_grad for p in shared.parameters()),
    }


@pytest.mark.parametrize(
    ("tied", "vocab_size"), [(False, 13), (True, 13), (False, 16)], ids=["untied", "tied", "without padding"]
)
def test_a_rank_holds_its_share_and_two_layers(tied: bool, vocab_size: int) -> None:
    for report in run_world(inspect, 3, tied, vocab_size):
        assert report["same"]
        assert report["finite"]
        assert not report["gradients"]
        assert report["held"] == report["shares"]
        if tied:  # the embedding is the output weight, too
            assert report["gathered"] == [[], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4], [0], []]
        else:
            assert report["gathered"] == [[], [0, 1], [1, 2], [2, 3], [3, 4], [4], [4], []]
