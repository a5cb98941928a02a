"""Rank-side of whole-run tests: train in this process and tell what happened."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint import save
from megatron_slm.checkpoint.fragments import fragments
from megatron_slm.cli.pretrain import main
from megatron_slm.flags.load import parse
from megatron_slm.model.block import Block
from megatron_slm.training.pretrain import pretrain
from megatron_slm.types import MicroBatch
from tests.support.runs import flags


def owned_numbers(optimizer: Any) -> list[Any]:
    """Copies of the weights and moments that this rank owns, one array each."""
    return [
        fragment.view(quantity).clone().numpy()
        for fragment in fragments(optimizer)
        for quantity in ("weight", "exp_avg", "exp_avg_sq")
        if quantity == "weight" or quantity in fragment.state
    ]


def train_and_report(values: dict[str, Any]) -> dict[str, Any]:
    """Run a training; what this rank saw and ended with."""
    kept: list[tuple[bytes, list[int]]] = []

    def observe(batch: MicroBatch, token_loss_N: Tensor, reference_loss_N: Tensor | None, kept_K: Tensor) -> None:
        kept.append((batch.tokens_bs.numpy().tobytes(), kept_K.tolist()))

    calls, real_forward = [0], Block.forward

    def counting(self: Block, x_sbd: Tensor, *beside: Any) -> Tensor:
        calls[0] += 1
        return real_forward(self, x_sbd, *beside)

    Block.forward = counting  # type: ignore[method-assign]
    config, _ = parse(flags(values))
    try:
        run = pretrain(config, observer=observe)
    finally:
        Block.forward = real_forward  # type: ignore[method-assign]
    optimizer = run.trainer.engine.optimizer
    return {
        "kept": kept,
        "optimizer": type(optimizer).__name__,
        "block_calls": calls[0],
        "accumulates_in": str(
            getattr(optimizer, "grad_acc_dtype", getattr(optimizer, "gradient_accumulation_dtype", None))
        ),
        "parameters": [p.detach().float().clone().numpy() for p in run.trainer.engine.module.parameters()],
        "owned": owned_numbers(optimizer),
        "step": run.state.step,
        "schedule": getattr(run.trainer.engine, "schedule", None),
        "rng": torch.get_rng_state().numpy(),
    }


def train_drawing_random_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """As above, with a random draw in every forward pass that is trained on, as a model with dropout makes."""
    real = Block.forward

    def drawing(self: Block, x_sbd: Tensor, *beside: Any) -> Tensor:
        if torch.is_grad_enabled():
            torch.rand(3)
        return real(self, x_sbd, *beside)

    Block.forward = drawing  # type: ignore[method-assign]
    return train_and_report(values)


def train_and_die_while_saving(values: dict[str, Any], step: int, rank: int, where: str) -> None:
    """As above, but `rank` is killed while it writes the checkpoint of `step`, after the function `where`."""
    real = getattr(save, where)

    def dying(path: Any, *args: Any, **kwargs: Any) -> Any:
        if where == "write_durably":  # the write of `latest`: the rename is done
            os._exit(9) if save.folder_name(step).encode() in args else None
        result = real(path, *args, **kwargs)
        if f"step_{step:08d}" in str(path) and int(os.environ["RANK"]) == rank:
            os._exit(9)
        return result

    setattr(save, where, dying)
    train_and_report(values)


def train_with_a_full_disk(values: dict[str, Any], rank: int, step: int) -> int:
    """The command, on a disk that takes no more than the first 10,000 bytes of a file of one rank from a step on."""
    real = save.write_tensor_file

    def on_a_full_disk(path: Any, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) != rank or f"step_{step:08d}" not in str(path):
            return real(path, *args, **kwargs)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            return real(path, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    save.write_tensor_file = on_a_full_disk
    return command(flags(values))


def command(argv: list[str]) -> int:
    """The command itself; its exit code is this process's."""
    raise SystemExit(main(argv))
