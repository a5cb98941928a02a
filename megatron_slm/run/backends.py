"""Chooses among the backends that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import BackendConfig, Backends
from megatron_slm.config.run import RunConfig
from megatron_slm.device import on_gpu
from megatron_slm.errors import ConfigError

FLASH_ATTENTION_WIDEST_HEAD = 256
"""flash-attn's kernels refuse wider heads."""


def run_backends(config: RunConfig, user_deepspeed: dict[str, Any], architectures: Iterable[Architecture]) -> Backends:
    """Choose a training run's backends (see `choose_backends`)."""
    return choose_backends(
        config.backend,
        bf16=config.training.bf16,
        zero_stage=ds_config.zero_stage(user_deepspeed),
        architectures=architectures,
        updates_on_host=ds_config.offloads_optimizer(user_deepspeed),
    )


def choose_backends(
    config: BackendConfig,
    *,
    bf16: bool,
    zero_stage: int,
    architectures: Iterable[Architecture],
    updates_on_host: bool = False,
) -> Backends:
    """Resolve `auto` to an installed backend.

    Args:
        updates_on_host: the optimizer is offloaded.
        architectures: of the model and the reference.

    Raises:
        ConfigError: a backend asked for by name is not installed or cannot run here.
    """
    gpu, widest = on_gpu(), max(arch.kv_channels for arch in architectures)
    if config.compile_blocks and zero_stage == 3:
        raise ConfigError(
            "--compile-blocks",
            True,
            "be off with ZeRO-3, whose hooks gather a block's weights while it runs",
            "leave it out, or use ZeRO-1 or ZeRO-2",
        )
    flash_takes = bf16 and widest <= FLASH_ATTENTION_WIDEST_HEAD
    attention, norm, optimizer = config.attention_backend, config.norm_backend, config.optimizer_backend
    if attention == "flash":
        _require_installed("--attention-backend", "flash", "flash_attn", "flash-attn", gpu=gpu, otherwise="sdpa")
        if not flash_takes:
            found = f"heads of width {widest}, {'bf16' if bf16 else 'fp32'}"
            rule = f"have heads of at most {FLASH_ATTENTION_WIDEST_HEAD} in bf16 (here: {found})"
            raise ConfigError("--attention-backend", "flash", rule, "add --bf16, or use sdpa")
    if norm == "apex":
        _require_installed("--norm-backend", "apex", "apex", "apex", gpu=gpu, otherwise="torch")
    if optimizer == "apex":
        _require_installed("--optimizer-backend", "apex", "apex", "apex", gpu=gpu, otherwise="torch")
    if optimizer == "deepspeed" and not gpu:
        raise ConfigError("--optimizer-backend", "deepspeed", "run on a GPU", "use torch (or auto) on a CPU")
    if updates_on_host and optimizer in ("apex", "deepspeed"):
        rule = "be torch or auto with zero_optimization.offload_optimizer, which updates on the host"
        raise ConfigError("--optimizer-backend", optimizer, rule, "use torch (or auto), or do not offload")
    apex = gpu and _installed("apex")
    if attention == "auto":
        attention = "flash" if gpu and flash_takes and _installed("flash_attn") else "sdpa"
    return Backends(
        attention=attention,
        norm=("apex" if apex else "torch") if norm == "auto" else norm,
        optimizer=("apex" if apex and not updates_on_host else "torch") if optimizer == "auto" else optimizer,
        compile_blocks=config.compile_blocks,
    )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _require_installed(flag: str, name: str, module: str, package: str, *, gpu: bool, otherwise: str) -> None:
    if not gpu:
        raise ConfigError(flag, name, "run on a GPU", f"use {otherwise} (or auto) on a CPU")
    if not _installed(module):
        raise ConfigError(flag, name, "be an installed backend", f"install {package}, or use {otherwise} (or auto)")
