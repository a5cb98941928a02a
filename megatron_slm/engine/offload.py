"""Saved activations in the host's memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from megatron_slm.device import on_gpu


class OffloadedActivations(save_on_cpu):
    """Inside the context, what autograd saves is copied to the host (pinned, on a GPU), and back when it is needed.

    The module's weights, and views of them, stay where they are: ZeRO-3 takes a weight's memory away in between.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(pin_memory=on_gpu())
        weights = {id(weight) for weight in module.parameters()}
        to_host, to_device = self.pack_hook, self.unpack_hook

        def pack(x: Tensor) -> Any:
            is_weight = id(x) in weights or (x._base is not None and id(x._base) in weights)
            return x if is_weight else to_host(x)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else to_device(packed)

        self.pack_hook, self.unpack_hook = pack, unpack


def saved_activations(module: nn.Module, *, offloads: bool) -> AbstractContextManager[Any]:
    """Return the context that a module's layers run in."""
    return OffloadedActivations(module) if offloads else nullcontext()
