"""Chooses what a process computes with: what is asked for, and what works here.

`auto` takes the fastest that works and falls back to torch's own, saying why; whatever is asked for by name is used or
refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_slm.backends import packages
from megatron_slm.backends.packages import Finding, Package, find
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Attention, BackendConfig, Backends, Norm, Optimizer
from megatron_slm.config.run import RunConfig
from megatron_slm.device import compute_capability, on_gpu
from megatron_slm.errors import ConfigError
from megatron_slm.model import sdpa
from megatron_slm.parallel.collectives import all_gather_objects

FLASH_ATTENTION_WIDEST_HEAD = 256
"""flash-attn's kernels refuse wider heads."""
_HOPPER = 9
"""Compute capability from which on torch's own attention (cuDNN's kernels) outruns flash-attn 2."""
_COMPARED = ("attention", "norm", "optimizer", "blocks", "element-wise", "loss head")


def run_backends(config: RunConfig, user_deepspeed: dict[str, Any], architectures: Iterable[Architecture]) -> Backends:
    """Choose a training run's backends (see `choose_backends`)."""
    return choose_backends(
        config.backend,
        bf16=config.training.bf16,
        zero_stage=ds_config.zero_stage(user_deepspeed),
        architectures=architectures,
        updates_on_host=ds_config.offloads_optimizer(user_deepspeed),
        keeps_documents_apart=config.data.reset_attention_mask,
        resets_positions=config.data.reset_position_ids,
        own_backward=not config.backward.is_exact or config.parallel.recompute_granularity == "selective",
        cuts_sequences=config.parallel.context_parallel_size > 1,
    )


def choose_backends(
    config: BackendConfig,
    *,
    bf16: bool,
    zero_stage: int,
    architectures: Iterable[Architecture],
    updates_on_host: bool = False,
    keeps_documents_apart: bool = False,
    resets_positions: bool = False,
    own_backward: bool = False,
    cuts_sequences: bool = False,
) -> Backends:
    """Resolve `auto` to a backend that works.

    Args:
        architectures: of the model and the reference.
        updates_on_host: the optimizer is offloaded.
        keeps_documents_apart: attention runs inside documents, of any length.
        resets_positions: positions start again in each document.
        own_backward: the blocks' backward passes are written out (sampled rows, selective recomputation).
        cuts_sequences: context-parallel ranks share every sequence.

    Raises:
        ConfigError: a backend asked for by name does not work here.
    """
    models = list(architectures)
    if config.compile_blocks and zero_stage == 3:
        raise ConfigError(
            "--compile-blocks",
            True,
            "be off with ZeRO-3, whose hooks gather a block's weights while it runs",
            "leave it out, or use ZeRO-1 or ZeRO-2",
        )
    notes: dict[str, str] = {}
    can_compile = config.compiles_on_gpu(
        zero_stage=zero_stage,
        own_backward=own_backward,
        resets_documents=keeps_documents_apart or resets_positions,
        cuts_sequences=cuts_sequences,
    )
    compile_blocks = _compiles(config.compile_blocks, can_compile, notes)
    return Backends(
        attention=_attention(config.attention_backend, models, bf16, keeps_documents_apart, notes),
        norm=_norm(config.norm_backend, notes),
        optimizer=_optimizer(config.optimizer_backend, updates_on_host, notes),
        compile_blocks=compile_blocks,
        fuses_elementwise=_fuses_elementwise(config, compile_blocks, notes),
        notes=notes,
    )


def check_same_on_all_ranks(backends: Backends, loss_head: str) -> None:
    """Refuse a run whose ranks chose differently, because one node lacks a package. Collective over the world.

    Raises:
        ConfigError: on every rank alike.
    """
    mine = (
        backends.attention,
        backends.norm,
        backends.optimizer,
        backends.compile_blocks,
        backends.fuses_elementwise,
        loss_head,
    )
    held = all_gather_objects(mine)
    for rank, theirs in enumerate(held):
        for what, first, other in zip(_COMPARED, held[0], theirs, strict=True):
            if first != other:
                raise ConfigError(
                    f"{what} backend of rank {rank}",
                    other,
                    f"be that of rank 0, {first!r}, so that all ranks round alike",
                    "install the same packages on all nodes, or choose a backend by name",
                )


def _attention(
    asked: str, models: list[Architecture], bf16: bool, keeps_documents_apart: bool, notes: dict[str, str]
) -> Attention:
    widest = max(arch.kv_channels for arch in models)
    capped = any(arch.attention_softcap is not None for arch in models)
    fits = bf16 and widest <= FLASH_ATTENTION_WIDEST_HEAD
    for name, package in (("flash", packages.FLASH), ("flash3", packages.FLASH3)):
        if asked == name:
            if capped:
                rule = "be sdpa (or auto) with a model whose attention has a soft cap, which is computed from tables"
                raise ConfigError("--attention-backend", name, rule, "use sdpa (or auto)")
            _require("--attention-backend", name, package, otherwise="sdpa")
            if not fits:
                found = f"heads of width {widest}, {'bf16' if bf16 else 'fp32'}"
                rule = f"have heads of at most {FLASH_ATTENTION_WIDEST_HEAD} in bf16 (here: {found})"
                raise ConfigError("--attention-backend", name, rule, "add --bf16, or use sdpa")
            return name  # type: ignore[return-value]
    if not on_gpu():
        return "sdpa"
    if capped:
        notes["attention"] = "tables of products, which have a soft cap"
    elif asked == "auto" and fits:
        tried = [find(packages.FLASH3), find(packages.FLASH)]
        if tried[0].works:
            return "flash3"
        windowed = any(arch.sliding_window is not None for arch in models)
        outrun = compute_capability() >= (_HOPPER, 0) and not windowed and not keeps_documents_apart
        if tried[1].works and not outrun:
            return "flash"
        better = tried[:1] if outrun and tried[1].works else tried
        notes["attention"] = "; ".join(f"{one.name}: {one.problem}" for one in better)
    _check_sdpa(models, bf16)
    return "sdpa"


def _check_sdpa(models: list[Architecture], bf16: bool) -> None:
    """Find out before the first step whether torch has a fused kernel for these heads."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    for arch in models:
        for window in {None, 32 if arch.sliding_window is not None else None}:
            try:
                packages.try_attention(sdpa.attend, width=arch.kv_channels, window=window, dtype=dtype)
            except RuntimeError as error:
                raise ConfigError(
                    "--attention-backend",
                    "sdpa",
                    f"have a fused kernel for heads of width {arch.kv_channels} in {dtype} ({error})",
                    "choose another width or precision (or --attention-backend flash)",
                ) from error


def _norm(asked: str, notes: dict[str, str]) -> Norm:
    if asked == "apex":
        _require("--norm-backend", "apex", packages.APEX_NORM, otherwise="torch")
        return "apex"
    if asked == "torch" or not on_gpu():
        return "torch"
    return "apex" if _noted(find(packages.APEX_NORM), "norm", notes) else "torch"


def _optimizer(asked: str, updates_on_host: bool, notes: dict[str, str]) -> Optimizer:
    if asked == "deepspeed" and not on_gpu():
        raise ConfigError("--optimizer-backend", "deepspeed", "run on a GPU", "use torch (or auto) on a CPU")
    if asked == "apex":
        _require("--optimizer-backend", "apex", packages.APEX_ADAM, otherwise="torch")
    if asked in ("apex", "deepspeed") and updates_on_host:
        rule = "be torch or auto with zero_optimization.offload_optimizer, which updates on the host"
        raise ConfigError("--optimizer-backend", asked, rule, "use torch (or auto), or do not offload")
    if asked != "auto":
        return asked  # type: ignore[return-value]
    if updates_on_host or not on_gpu():
        return "torch"
    return "apex" if _noted(find(packages.APEX_ADAM), "optimizer", notes) else "torch"


def _compiles(asked: bool | None, can_compile: bool, notes: dict[str, str]) -> bool:
    if asked is not None:
        return asked
    return on_gpu() and can_compile and _noted(find(packages.COMPILER), "blocks", notes)


def _fuses_elementwise(config: BackendConfig, compile_blocks: bool, notes: dict[str, str]) -> bool:
    if not config.fuses_elementwise_on_gpu(compiles_blocks=compile_blocks):
        return False
    if config.compile_elementwise is None:
        return on_gpu() and _noted(find(packages.COMPILER), "element-wise", notes)
    if on_gpu() and not (found := find(packages.COMPILER)).works:
        rule = f"have a compiler that works here ({found.name}: {found.problem})"
        raise ConfigError("--compile-elementwise", True, rule, f"{packages.COMPILER.fix}; or leave it out")
    return True


def _noted(found: Finding, what: str, notes: dict[str, str]) -> bool:
    if not found.works:
        notes[what] = f"{found.name}: {found.problem}"
    return found.works


def _require(flag: str, name: str, package: Package, *, otherwise: str) -> None:
    if not on_gpu():
        raise ConfigError(flag, name, "run on a GPU", f"use {otherwise} (or auto) on a CPU")
    found = find(package)
    if not found.works:
        rule = f"be a backend that works here ({found.name}: {found.problem})"
        raise ConfigError(flag, name, rule, f"{package.fix}; or use {otherwise} (or auto)")
