"""AdamW over the trained parameters, before ZeRO partitions them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from megatron_slm.config.optimizer import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group matrices with weight decay and vectors (norms, biases) without."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, backend: Literal["torch", "apex", "deepspeed"], device: torch.device
) -> torch.optim.Optimizer:
    """Build one of three implementations of AdamW; their updates agree up to rounding."""
    groups = parameter_groups(module, config.weight_decay)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    if backend == "torch":
        return torch.optim.AdamW(groups, **options, fused=device.type == "cuda")
    if backend == "apex":
        from apex.optimizers import FusedAdam
    else:
        from deepspeed.ops.adam import FusedAdam
    return FusedAdam(groups, **options, adam_w_mode=True)
