"""AdamW over the trained parameters; ZeRO partitions what it is given."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from megatron_slm.config import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay, vectors (norms, biases) without."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW: apex's fused one on a GPU where apex is installed, else torch's (fused on a GPU)."""
    groups = parameter_groups(module, config.weight_decay)
    betas = (config.adam_beta1, config.adam_beta2)
    if device.type == "cuda" and importlib.util.find_spec("apex") is not None:
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, lr=config.lr, betas=betas, eps=config.adam_eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=device.type == "cuda")
