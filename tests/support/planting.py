"""Rank-side: runs in which numbers are planted into the samples of a rank's micro-batches."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_slm.cli.pretrain import main
from megatron_slm.flags.load import parse
from megatron_slm.loss.objective import Objective
from megatron_slm.model.llama import Embedding
from megatron_slm.training import loop, replay
from megatron_slm.training.build import Run
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags
from tests.support.training import owned_numbers

Kind = Literal["loss", "gradient", "spike"]


class _BadBackward(torch.autograd.Function):
    """Nothing forwards; one element of the gradient becomes NaN backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        grad.view(-1)[7] = math.nan
        return grad


def plant(kind: Kind, samples: list[int]) -> None:
    """Make every forward pass on one of these samples (by their number in the run) a bad one, in training only.

    A loss: one hidden state of it is NaN in the embedding's output. A gradient: the embedding's output gets a gradient
    with a NaN, from finite losses. A spike: its logits are 30 times what they were.
    """
    real_step, real_forward = loop.train_step, Embedding.forward
    bad: set[bytes] = set()  # by their tokens: ZeRO-3 hands the model copies

    def step(trainer: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        def marked(i: int) -> Any:
            batch = source(i)
            if set(batch.sample_b.tolist()) & set(samples):
                bad.add(batch.tokens_bs.numpy().tobytes())
            return batch

        return real_step(trainer, marked, *args, **kwargs)

    def forward(self: Embedding, tokens_bs: Tensor) -> Tensor:
        x_sbd = real_forward(self, tokens_bs)
        if not torch.is_grad_enabled() or tokens_bs.numpy().tobytes() not in bad:
            return x_sbd
        if kind == "gradient":
            return _BadBackward.apply(x_sbd)
        return x_sbd + torch.zeros_like(x_sbd).index_fill_(0, torch.tensor([3]), math.nan)

    real_loss = Objective.loss

    def loss(self: Objective, x_sbd: Tensor, output: Any, batch: Any, *args: Any) -> Any:
        is_bad = batch.tokens_bs.numpy().tobytes() in bad
        return real_loss(self, x_sbd * 30 if is_bad else x_sbd, output, batch, *args)

    loop.train_step = replay.train_step = step  # type: ignore[assignment]
    if kind == "spike":
        Objective.loss = loss  # type: ignore[method-assign]
    else:
        Embedding.forward = forward  # type: ignore[method-assign]


def state(run: Run) -> dict[str, Any]:
    """All that a step could have changed."""
    return {
        "parameters": [p.detach().float().clone().numpy() for p in run.trainer.engine.module.parameters()],
        "owned": owned_numbers(run.trainer.engine.optimizer),
        "adam_step": run.state.adam_step,
        "threshold": run.state.score_threshold,
        "tokens": (run.state.tokens_seen, run.state.tokens_kept),
        "recent": run.state.recent_losses,
        "step": run.state.step,
    }


def train_planted(values: dict[str, Any], kind: Kind, samples: list[int]) -> dict[str, Any]:
    """A run with planted samples, and the state it ends with."""
    plant(kind, samples)
    return state(pretrain(parse(flags(values))[0]))


def train_clean(values: dict[str, Any]) -> dict[str, Any]:
    """A run, and the state it ends with."""
    return state(pretrain(parse(flags(values))[0]))


def command_planted(values: dict[str, Any], kind: Kind, samples: list[int]) -> None:
    """The command, with planted samples."""
    plant(kind, samples)
    raise SystemExit(main(flags(values)))
