"""Runs with other backends: the same losses, and exact resumes."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from megatron_slm.backends import choice as backends
from megatron_slm.model import block, fused
from tests.support.runs import flags, recorded, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backends")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    return path


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return recorded(run_dir)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir)]


# ---- the optimizers of apex and DeepSpeed, with their own bookkeeping and torch's arithmetic -----------------


def adam_lists(
    _chunk: int, _noop: Any, lists: list[list[torch.Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, adam_w: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """What both makers' kernel `multi_tensor_adam` computes (csrc/adam/multi_tensor_adam.cu)."""
    assert adam_w == bias_correction == 1
    assert type(step) is int
    for grad, parameter, first, second in zip(*lists, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps) + weight_decay * parameter
        parameter.sub_(lr * update)


class ApexFusedAdam(torch.optim.Optimizer):
    """As apex.optimizers.FusedAdam keeps its books: the step in the group, from 1 where there is none."""

    def __init__(self, params: Any, *, lr: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            held: list[list[torch.Tensor]] = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                for one, x in zip(held, (p.grad, p, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    one.append(x)
            beta1, beta2 = group["betas"]
            adam_lists(0, 0, held, group["lr"], beta1, beta2, group["eps"], group["step"], 1, 1, group["weight_decay"])


def train_with_optimizer(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Train with apex' or DeepSpeed's FusedAdam, whose kernels are replaced by `adam_lists`."""
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")  # type: ignore[attr-defined]
    apex.optimizers.FusedAdam = ApexFusedAdam
    sys.modules.update({"apex": apex, "apex.optimizers": apex.optimizers})
    ZERO_SUPPORTED_OPTIMIZERS.append(ApexFusedAdam)  # as DeepSpeed does where apex is installed
    from deepspeed.ops.adam import fused_adam

    class Builder:
        def load(self) -> Any:
            return types.SimpleNamespace(multi_tensor_adam=adam_lists)

    fused_adam.FusedAdamBuilder = Builder
    real = backends.choose_backends
    backends.choose_backends = lambda *args, **options: replace(real(*args, **options), optimizer=name)  # type: ignore
    return train_and_report(values)


@pytest.mark.parametrize("name", ["apex", "deepspeed"])
def test_an_optimizer_is_torchs_and_resumes_exactly(name: str, folder: Path, tmp_path: Path) -> None:
    options = {"pipeline_model_parallel_size": 2, "train_iters": 4, "weight_decay": 0.3}
    run_world(train_and_report, 2, run_flags(folder / "corpus", tmp_path / "torch", **options))
    options |= {"save_interval": 2}
    whole = run_world(train_with_optimizer, 2, run_flags(folder / "corpus", tmp_path / "whole", **options), name)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "torch"), rel=1e-5)
    options |= {"load": tmp_path / "whole" / "checkpoints" / "step_00000002"}
    resumed = run_world(train_with_optimizer, 2, run_flags(folder / "corpus", tmp_path / "resumed", **options), name)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")[2:]
    for one, other in zip(whole, resumed, strict=True):
        assert all((a == b).all() for a, b in zip(one["owned"], other["owned"], strict=True))


# ---- compiled blocks -----------------------------------------------------------------------------------------


def train_compiled(values: dict[str, Any], compiler: str) -> dict[str, Any]:
    block.COMPILER = compiler
    report = train_and_report(values)
    stats = torch._dynamo.utils.counters["stats"]
    return {**report, "graphs": stats["unique_graphs"]}


LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 tp2 sp recomputing": {
        "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
        "recompute_granularity": "full",
    },
    "zero2 dp2": {"deepspeed_config": zero_config(2)},
}  # fmt: skip


def compare_compiled(layout: str, folder: Path, tmp_path: Path, compiler: str) -> None:
    options = {**LAYOUTS[layout], "train_iters": 3, "objective": "slm", "reference_load": folder / "reference"}
    world_size = 4 if "tp2" in layout else 2
    run_world(train_and_report, world_size, run_flags(folder / "corpus", tmp_path / "eager", **options))
    values = run_flags(folder / "corpus", tmp_path / "compiled", **options, compile_blocks=True)
    reports = run_world(train_compiled, world_size, values, compiler, timeout_seconds=600)
    assert all(report["graphs"] for report in reports)
    eager, compiled = lines(tmp_path / "eager"), lines(tmp_path / "compiled")
    for name in ("loss", "loss_all", "reference_loss", "grad_norm", "kept_tokens"):
        assert [x[name] for x in compiled] == pytest.approx([x[name] for x in eager], rel=1e-5), name


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * ("tp2" not in name)) for name in LAYOUTS]
)
def test_compiled_blocks_train_alike(layout: str, folder: Path, tmp_path: Path) -> None:
    compare_compiled(layout, folder, tmp_path, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_train_alike_through_inductor(layout: str, folder: Path, tmp_path: Path) -> None:
    compare_compiled(layout, folder, tmp_path, "inductor")


# ---- compiled element-wise work ------------------------------------------------------------------------------------


def train_fused(values: dict[str, Any], compiler: str) -> dict[str, Any]:
    fused.COMPILER = compiler
    report = train_and_report(values)
    stats = torch._dynamo.utils.counters["stats"]
    return {**report, "graphs": stats["unique_graphs"]}


WITHOUT_BLOCKS: dict[str, dict[str, Any]] = {
    "pp2 sampled rows": {"pipeline_model_parallel_size": 2, "backward_rows": "sampled", "backward_row_share": 0.75},
    "tp2 sp recomputing documents": {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full",
        "reset_attention_mask": True, "reset_position_ids": True,
    },
    "zero3 dp2": {"deepspeed_config": zero_config(3)},
}  # fmt: skip
"""Where whole blocks cannot be compiled."""


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name != "pp2 sampled rows")) for name in WITHOUT_BLOCKS]
)
def test_compiled_elementwise_work_trains_alike(layout: str, compiler: str, folder: Path, tmp_path: Path) -> None:
    options = {**WITHOUT_BLOCKS[layout], "train_iters": 2, "objective": "slm", "reference_load": folder / "reference"}
    run_world(train_and_report, 2, run_flags(folder / "corpus", tmp_path / "eager", **options))
    values = run_flags(folder / "corpus", tmp_path / "fused", **options, compile_elementwise=True)
    reports = run_world(train_fused, 2, values, compiler, timeout_seconds=600)
    assert all(report["graphs"] >= 6 for report in reports), "norm, activation and rotation, forward and backward"
    eager, ours = lines(tmp_path / "eager"), lines(tmp_path / "fused")
    for name in ("loss", "loss_all", "reference_loss", "grad_norm", "kept_tokens"):
        assert [x[name] for x in ours] == pytest.approx([x[name] for x in eager], rel=1e-5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile_blocks": True, "deepspeed_config": zero_config(3)}, "be off with ZeRO-3"),
        ({"compile_blocks": True, "reset_attention_mask": True}, "be off with --reset-attention-mask"),
        ({"attention_backend": "flash"}, "--attention-backend is 'flash'"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorldError) as failed:
        run_world(command, 1, flags(run_flags(folder / "corpus", tmp_path / "run", **options)))
    assert message in failed.value.outputs[0]
    assert not os.path.exists(tmp_path / "run" / "metrics.jsonl")
