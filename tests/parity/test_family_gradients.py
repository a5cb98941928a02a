"""Losses and gradients of every family over two tensor-parallel ranks are those of transformers' autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_slm.api.causal_lm import micro_batch
from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.convert.families import family_named
from megatron_slm.convert.hf_config import architecture_of
from megatron_slm.convert.stored_names import LogicalSource
from megatron_slm.convert.tensors import expected_tensors
from megatron_slm.engine.module import output_rows
from megatron_slm.loss.objective import Objective, StepSettings
from megatron_slm.model.llama import layer_list
from megatron_slm.parallel.groups import create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import Part, parts_of
from megatron_slm.parallel.topology import Topology
from megatron_slm.selection.selector import Selector
from tests.support.families import FAMILIES, family_model
from tests.support.models import StateDictSource, dense_stage, logits_bsV
from tests.support.world import run_world

NAMES = ["smollm3", "granite 3", "phi-4-mini with longrope", "glm-4", "olmo 2", "olmo 3", "gemma 2", "gemma 3"]
"""One for each kind of mathematics that Llama and Qwen3 do not have."""
TOKENS_BT = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(3))
Gradients = list[tuple[Part, Tensor]]


class Tensors:
    """A `TensorSource` over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def files(self) -> dict[str, str]:
        return dict.fromkeys(self.tensors, "memory")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


def logical(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logical tensors of a model of transformers, from its own."""
    arch = architecture_of(model.config.to_dict(), "config.json")
    family = family_named(model.config.model_type)
    assert family is not None
    source = LogicalSource(Tensors(tensors), expected_tensors(arch), family.stored_modules)
    return {name: source.rows(name, 0, shape[0]) for name, shape in source.shapes().items()}


def theirs(name: str) -> tuple[float, dict[str, Tensor]]:
    model: Any = family_model(name)
    logits_NV = model(TOKENS_BT).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits_NV, TOKENS_BT[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return float(loss.detach()), logical(model, {key: p.grad for key, p in model.named_parameters()})


def ours(names: list[str], tensor: int, sequence_parallel: bool) -> dict[str, tuple[float, Gradients]]:
    init_distributed()
    tp = create_tensor_parallel_group(
        Topology(tensor=tensor), sequence_parallel=sequence_parallel, num_query_groups=[2]
    )
    batch = micro_batch(TOKENS_BT)
    out: dict[str, tuple[float, Gradients]] = {}
    for name in names:
        model: Any = family_model(name)
        arch = architecture_of(model.config.to_dict(), "config.json")
        layers = ParallelLayers(tp, vocabulary_divisible_by=16)
        modules = nn.ModuleList(maker.make() for maker in layer_list(arch, layers))
        fill_module(modules, StateDictSource(logical(model, dict(model.state_dict()))))
        x: Tensor = batch.tokens_bs
        for module in modules:
            x = module(x)
        output = output_rows(modules[-1], modules[-1].output or modules[0].embed_tokens)  # type: ignore[arg-type]
        loss, _ = Objective(selector=Selector(), tp=tp).loss(x, output, batch, None, StepSettings(step=0))
        loss.backward()
        found: Gradients = []
        for parameter in modules.parameters():
            assert parameter.grad is not None
            start = 0
            for part in parts_of(parameter):
                found.append((part, parameter.grad[start : start + part.local_shape[0]]))
                start += part.local_shape[0]
        out[name] = float(loss.detach()), found
    return out


@pytest.mark.parametrize(
    ("names", "tensor", "sequence_parallel"),
    [
        (NAMES, 2, True),
        pytest.param(list(FAMILIES), 2, False, marks=pytest.mark.slow),
        pytest.param(NAMES, 4, True, marks=pytest.mark.slow),
    ],
    ids=["sequence parallel", "all families", "more ranks than key/value heads"],
)
def test_tensor_parallel_ranks(names: list[str], tensor: int, sequence_parallel: bool) -> None:
    ranks = run_world(ours, tensor, names, tensor, sequence_parallel)
    for name in names:
        loss, gradients = theirs(name)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for found_loss, found in (rank[name] for rank in ranks):
            assert found_loss == pytest.approx(loss, rel=1e-5), name
            assert {part.name for part, _ in found} == gradients.keys()
            for part, gradient in found:
                whole = gradients[part.name]
                held = whole if part.dim is None else whole.narrow(part.dim, part.start, part.length)
                scale = max(float(whole.abs().max()), 0.01 * largest)  # some are zero but for rounding
                assert (gradient - held).abs().max() <= 2e-5 * scale, (name, part.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama 3", *NAMES])
def test_bf16_is_as_near_to_fp32_as_transformers_is(name: str) -> None:
    model: Any = family_model(name)
    stage = dense_stage(
        architecture_of(model.config.to_dict(), "config.json"), logical(model, dict(model.state_dict()))
    )
    with torch.no_grad():
        exact = model(TOKENS_BT).logits.log_softmax(-1)
        ours_in_bf16 = logits_bsV(stage.to(torch.bfloat16), TOKENS_BT).float().log_softmax(-1)
        theirs_in_bf16 = model.to(torch.bfloat16)(TOKENS_BT).logits.float().log_softmax(-1)
    assert (ours_in_bf16 - exact).abs().mean() <= 1.3 * (theirs_in_bf16 - exact).abs().mean()
